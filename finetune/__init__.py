"""Training of the experts. Not there yet: `r4r_graph` runs adapters of any origin in PEFT format.

This package will make them, with the prompts rendered by `r4r_graph.prompts`, as at inference.
"""
