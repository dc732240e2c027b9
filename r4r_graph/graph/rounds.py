"""Rounds of rationales: how many are drawn next, and with which seeds.

One rationale is greedy; several are sampled, and so is what replaces a refused one. No two
rationales of a run share a seed, those that a person refused among them.
"""

from __future__ import annotations

from r4r_graph.experts import Sampling
from r4r_graph.graph import human
from r4r_graph.graph.state import RatingState, knobs_of

_SEEDS_A_RUN = 1_000_003
"""Apart lie the seeds of two runs whose knob `seed` differs by one."""


def next_round(state: RatingState) -> Sampling:
    """How the reasoner draws its next rationales."""
    settings, kept = knobs_of(state), len(state["rationales"])
    siblings = state["case"].get("siblings", 1)
    if _greedy(state):
        return Sampling((settings.seed,), siblings=siblings)
    size = max(1, min(settings.round_size, settings.rationales - kept))
    drawn = kept + human.refused(state)
    seeds = tuple(settings.seed * _SEEDS_A_RUN + drawn + i for i in range(size))
    return Sampling(seeds, settings.temperature, settings.top_p, kept, siblings)


def drawn_again(state: RatingState) -> Sampling | None:
    """How the run's rationales, those apart that a person wrote, are drawn once more; None where a
    person wrote them all."""
    settings = knobs_of(state)
    seeds = tuple(drawn["seed"] for drawn in state["rationales"] if not drawn.get("edited"))
    if not seeds:
        return None
    if _greedy(state):
        return Sampling(seeds)
    return Sampling(seeds, settings.temperature, settings.top_p)


def _greedy(state: RatingState) -> bool:
    return knobs_of(state).rationales == 1 and not human.refused(state)
