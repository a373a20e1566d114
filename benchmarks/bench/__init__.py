"""One benchmark of this package and its peers: same model, text, process and threads, in turns."""
