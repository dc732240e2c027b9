"""The command line, `r4r`: thin, over the facade. Data goes to stdout, all else to stderr."""

from r4r_graph.cli.main import app, main

__all__ = ["app", "main"]
