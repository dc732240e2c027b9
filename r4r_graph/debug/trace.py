"""What a kept run did, out of its checkpoints: all that its report shows.

Nothing is executed: the graph is asked for its kept states and for its edges, no more. A run that
failed, waits or was killed gives a trace like any other, up to where it stands.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from langgraph.graph import END, START
from langgraph.types import StateSnapshot

from r4r_graph import runs
from r4r_graph.debug.steps import Standing, Step, added, busy_seconds, steps_of
from r4r_graph.graph import RatingGraph
from r4r_graph.graph.outcome import evidence_of, mixture
from r4r_graph.graph.state import Json
from r4r_graph.ratings import RatingDistribution, RatingScale, RatingStats
from r4r_graph.schema import ColdStart, Recommendation, ReviewAspects, Truncation


@dataclass(frozen=True, slots=True)
class TracedRationale:
    """A rationale, and what the predictor made of it."""

    text: str
    seed: int
    edited: bool
    """Whether a person wrote it."""
    distribution: RatingDistribution | None
    """None before it is rated with."""


@dataclass(frozen=True, slots=True)
class GraphNode:
    """A node of the graph, and what it did in this run."""

    name: str
    steps: int
    """Steps of it that ran in this run."""
    earlier: int
    """Steps of it that ran before; see `Standing`."""
    standing: Standing | None
    """Of its last step; None where it has none."""
    seconds: float
    """Wall time during which any of its steps was at work; for `human` the time waited."""
    calls: int
    cache_hits: int


@dataclass(frozen=True, slots=True)
class GraphEdge:
    """An edge of the graph."""

    source: str
    target: str
    conditional: bool
    taken: int
    """How often: a fan-out of twenty counts twenty."""


@dataclass(frozen=True, slots=True)
class RunTrace:
    """A run, in the order in which its report tells it."""

    thread_id: str
    forked_from: str | None
    status: runs.Status
    user_id: str
    item_id: str
    title: str
    as_of: float | None
    """Only reviews strictly before this time (unix seconds) were read."""
    started: float
    ended: float | None
    """None where it is not finished."""
    error: str
    """What it failed with; empty where it did not."""
    question: Mapping[str, Any] | None
    """What it asks a person now; see `graph.human`."""
    knobs: Mapping[str, Any]
    recommendation: Recommendation | None
    """Where it has rated already: also of a run that failed or waits later on."""
    rationales: tuple[TracedRationale, ...]
    distribution: RatingDistribution | None
    """The mixture."""
    user_reviews: tuple[ReviewAspects, ...]
    """As they were recalled, before anything was cut to its budget."""
    item_reviews: tuple[ReviewAspects, ...]
    user_stats: RatingStats
    item_stats: RatingStats
    cold_start: ColdStart | None
    answers: tuple[Mapping[str, Any], ...]
    truncated: tuple[Truncation, ...]
    warnings: tuple[str, ...]
    model: Mapping[str, Any]
    """Base model, adapters and prompt digests; empty before the run has rated."""
    steps: tuple[Step, ...]
    nodes: tuple[GraphNode, ...]
    edges: tuple[GraphEdge, ...]

    @property
    def recorded(self) -> bool:
        """Whether prompts and outputs were kept."""
        return any(step.exchanges for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; times are unix seconds."""
        rated = self.recommendation
        return {
            "thread_id": self.thread_id,
            "forked_from": self.forked_from,
            "status": self.status,
            "user_id": self.user_id,
            "item_id": self.item_id,
            "title": self.title,
            "as_of": self.as_of,
            "started": self.started,
            "ended": self.ended,
            "error": self.error,
            "question": None if self.question is None else dict(self.question),
            "knobs": dict(self.knobs),
            "recommendation": None if rated is None else rated.to_dict(),
            "rationales": [
                {
                    "text": drawn.text,
                    "seed": drawn.seed,
                    "edited": drawn.edited,
                    "distribution": drawn.distribution and drawn.distribution.to_dict(),
                }
                for drawn in self.rationales
            ],
            "user_reviews": [review.to_dict() for review in self.user_reviews],
            "item_reviews": [review.to_dict() for review in self.item_reviews],
            "user_stats": self.user_stats.to_dict(),
            "item_stats": self.item_stats.to_dict(),
            "cold_start": self.cold_start,
            "answers": [dict(answer) for answer in self.answers],
            "truncated": [asdict(cut) for cut in self.truncated],
            "warnings": list(self.warnings),
            "steps": [
                {**asdict(step), "review": step.review and step.review.to_dict()}
                for step in self.steps
            ],
            "nodes": [asdict(node) for node in self.nodes],
            "edges": [asdict(edge) for edge in self.edges],
        }


def trace(graph: RatingGraph, thread_id: str) -> RunTrace:
    """What the run under this thread did; where the thread served several, the latest.

    Args:
        graph: a rating graph whose checkpointer keeps the run. Its experts and its review source
            are not asked: any will do.
        thread_id: the run.

    Raises:
        UnknownRunError: there is none under this id, or what is kept is no run of this graph.
        SettingError: the graph keeps no runs.
    """
    states = runs.history(graph, thread_id)
    info, last = runs.info(states, thread_id), states[-1]
    values = _found_so_far(last)
    case: Json = values.get("case") or {}
    steps = steps_of(states, values)
    distributions = values.get("distributions") or []
    rated = values.get("recommendation") if distributions else None
    recommendation = Recommendation.from_dict(rated) if rated else None
    scale = recommendation.distribution.scale if recommendation else None
    evidence = evidence_of(values) if case else None
    return RunTrace(
        thread_id=thread_id,
        forked_from=info.forked_from,
        status=info.status,
        user_id=info.user_id,
        item_id=info.item_id,
        title=case.get("item", {}).get("title", ""),
        as_of=case.get("as_of"),
        started=info.started,
        ended=runs.seconds(last) if info.status == "finished" else None,
        error="; ".join(dict.fromkeys(step.error for step in steps if step.error)),
        question=runs.question(last),
        knobs=asdict(runs.knobs_of_run(last)),
        recommendation=recommendation,
        rationales=_rationales(values.get("rationales") or [], distributions, scale),
        distribution=mixture(distributions, scale) if scale is not None else None,
        user_reviews=evidence.user_reviews if evidence else (),
        item_reviews=evidence.item_reviews if evidence else (),
        user_stats=evidence.user_stats if evidence else RatingStats(),
        item_stats=evidence.item_stats if evidence else RatingStats(),
        cold_start=case.get("cold_start"),
        answers=tuple(values.get("answers") or ()),
        truncated=tuple(Truncation(**cut) for cut in values.get("truncated") or ()),
        warnings=tuple(case.get("warnings", ())),
        model=recommendation.model if recommendation else {},
        steps=steps,
        nodes=_nodes(graph, steps),
        edges=_edges(graph, states),
    )


# The state ---------------------------------------------------------------------------------------


def _found_so_far(last: StateSnapshot) -> Any:
    """The run's state, with what those steps found that ended before a sibling of theirs failed."""
    if set(last.next) & {START, "recall"}:  # what is there is another run's, on the same thread
        return {}
    values = dict(last.values)
    for task in last.tasks:
        values["truncated"] = [*values["truncated"], *added(task.result, "truncated")]
        if task.name == "summarizer" and task.result is not None:
            values["summaries"] = {**values["summaries"], **task.result["summaries"]}
    return values


def _rationales(
    drawn: Sequence[Json], distributions: Sequence[Json], scale: RatingScale | None
) -> tuple[TracedRationale, ...]:
    pairs = itertools.zip_longest(drawn, distributions[: len(drawn)] if scale else ())
    return tuple(
        TracedRationale(
            text=one["text"],
            seed=one["seed"],
            edited=one.get("edited", False),
            distribution=RatingDistribution(scale, tuple(rated["probabilities"]), rated["mass"])
            if rated and scale
            else None,
        )
        for one, rated in pairs
    )


# The graph as executed ---------------------------------------------------------------------------


def _nodes(graph: RatingGraph, steps: Sequence[Step]) -> tuple[GraphNode, ...]:
    found = []
    for name in graph.get_graph().nodes:
        mine = [step for step in steps if step.node == name]
        ran = [step for step in mine if step.standing not in ("earlier", "pending")]
        found.append(
            GraphNode(
                name=name,
                steps=len(ran),
                earlier=sum(step.standing == "earlier" for step in mine),
                standing=_worst(mine),
                seconds=busy_seconds(ran),
                calls=sum(step.calls for step in ran),
                cache_hits=sum(step.cache_hits for step in ran),
            )
        )
    return tuple(found)


def _worst(steps: Sequence[Step]) -> Standing | None:
    """A node whose last steps did not all end well stands as the worst of them."""
    order: tuple[Standing, ...] = ("failed", "waiting", "pending", "done", "earlier")
    standings = {step.standing for step in steps}
    return next((standing for standing in order if standing in standings), None)


def _edges(graph: RatingGraph, states: Sequence[StateSnapshot]) -> tuple[GraphEdge, ...]:
    forked_after = runs.labels_of(states[0]).get(runs.FORKED_AFTER)
    ran = [[task.name for task in state.tasks] or [END] for state in states]
    taken: dict[tuple[str, str], int] = {}
    for sources, targets in itertools.pairwise([[forked_after], *ran] if forked_after else ran):
        for pair in set(itertools.product(sources, targets)):
            times = max(sources.count(pair[0]), targets.count(pair[1]))
            taken[pair] = taken.get(pair, 0) + times
    return tuple(
        GraphEdge(e.source, e.target, e.conditional, taken.get((e.source, e.target), 0))
        for e in graph.get_graph().edges
    )
