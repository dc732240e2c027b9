"""Rejection sampling of rationales: draws, screens, and a judge that keeps what helps.

`sampling` is the step; `candidates` ranks ready-made ones instead. Both send each candidate through
`judging`, whose screens are in `leaks`, and write what survived with `kept`.
"""
