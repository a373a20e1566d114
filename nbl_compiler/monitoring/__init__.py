"""Watching compiled models at run time: ``nbl_compiler.monitor``."""
