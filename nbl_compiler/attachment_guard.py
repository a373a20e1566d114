"""A Dynamo guard on the plan registry.

Dynamo would reuse compiled code after ``nbl.attach``: nothing it guards on has changed. A graph
whose plan was looked up through the registry therefore guards on the registry's generation.
"""

from __future__ import annotations


def guard_on_attachments() -> None:
    """Make the graph being compiled depend on ``nbl_compiler.registry.generation``."""
    from torch._dynamo.guards import GuardBuilder
    from torch._dynamo.source import AttrSource
    from torch._dynamo.symbolic_convert import tls
    from torch._guards import install_guard

    translator = getattr(tls, "current_tx", None)
    if translator is None:  # called outside Dynamo: nothing is cached, so nothing goes stale
        return
    source = AttrSource(translator.import_source("nbl_compiler.registry"), "generation")
    install_guard(source.make_guard(GuardBuilder.EQUALS_MATCH))
