"""Supervised training of all experts, on TRL.

`train` holds the four steps; `examples` makes their rows, `fitting` fits one adapter, `trainer` is
the loop and `losses` the rating experts' loss; `validation` and `check` measure what came out.
"""
