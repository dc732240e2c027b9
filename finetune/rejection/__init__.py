"""Rejection sampling of rationales: draws, screens, and a judge that keeps what helps.

`sampling` is the step; `candidates` ranks ready-made ones instead. Both send each candidate through
`judging`, whose screens are in `r4r_graph.evaluation.words.leaks`, and write what survived with
`kept`.
"""
