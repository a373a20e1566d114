"""The report of ``nbl explain --html``: one file that opens anywhere, without a network."""
