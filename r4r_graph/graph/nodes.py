"""The steps of the graph. Each takes the state and returns an update of it.

A step that asks the engine has two bodies, one that waits and one that awaits, around the same
preparation and the same update; the awaiting one holds no thread.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from langgraph.runtime import get_runtime
from langgraph.types import Overwrite, Send

from r4r_graph.engine.base import RateResult
from r4r_graph.evidence import Evidence
from r4r_graph.experts import Experts, Rationale, Sampling, Summarized
from r4r_graph.graph import recall as rules
from r4r_graph.graph.outcome import evidence_of, mixture, recommend
from r4r_graph.graph.state import Json, Knobs, RatingState, SummarizerTask, knobs
from r4r_graph.reviews import ReviewSource
from r4r_graph.schema import Review


class Nodes:
    """The graph's steps and routes, bound to their experts and reviews."""

    def __init__(self, experts: Experts, reviews: ReviewSource | None) -> None:
        self._experts = experts
        self._summarizer = experts.summarizer
        self._reasoner = experts.reasoner
        self._predictor = experts.predictor
        self._reviews = reviews

    # recall ----------------------------------------------------------------------------------

    def recall(self, state: RatingState) -> Json:
        """Find both histories, and forget what an earlier run on this thread found."""
        update = rules.recall(state, knobs(), self._reviews, self._experts.scale)
        fresh = ("rationales", "distributions", "truncated", "spans")
        return {
            **update,
            "summaries": Overwrite({}),
            **{name: Overwrite([]) for name in fresh},
            "recommendation": {},
        }

    def after_recall(self, state: RatingState) -> list[Send] | Literal["reasoner"]:
        """A review with words goes to the summarizer; with none to read, on to the reasoner (an
        empty fan-out would end the run)."""
        entries = {
            entry["key"]: entry
            for entry in (*state["user_reviews"], *state["item_reviews"])
            if entry["review"]["review"].strip()
        }
        tasks = [
            Send("summarizer", SummarizerTask(entry=entry, siblings=len(entries)))
            for entry in entries.values()
        ]
        return tasks or "reasoner"

    # summarizer ------------------------------------------------------------------------------

    def summarize(self, task: SummarizerTask) -> Json:
        """Summarize one review."""
        started = time.time()
        made = self._summarizer.summarize(*_summarizer_arguments(task))
        return self._summarized(task, made, started)

    async def asummarize(self, task: SummarizerTask) -> Json:
        """As `summarize`."""
        started = time.time()
        made = await self._summarizer.asummarize(*_summarizer_arguments(task))
        return self._summarized(task, made, started)

    @staticmethod
    def _summarized(task: SummarizerTask, made: Summarized, started: float) -> Json:
        entry = task["entry"]
        get_runtime().stream_writer(
            {
                "event": "summary",
                "key": entry["key"],
                "user_id": entry["review"]["user_id"],
                "item_id": entry["review"]["item_id"],
                "cached": made.cached,
                "of": task["siblings"],
            }
        )
        return {
            "summaries": {entry["key"]: made.summary.to_dict()},
            "truncated": [asdict(cut) for cut in made.truncated],
            "spans": [
                _span(
                    "summarizer",
                    started,
                    calls=int(not made.cached),
                    cache_hits=int(made.cached),
                    prompt_tokens=made.prompt_tokens,
                    completion_tokens=made.completion_tokens,
                )
            ],
        }

    # reasoner --------------------------------------------------------------------------------

    def reason(self, state: RatingState) -> Json:
        """Write the next round of rationales."""
        started = time.time()
        evidence, cuts = self._experts.fit(evidence_of(state))
        sampling = _next_round(state, knobs())
        drawn = self._reasoner.write(evidence, sampling)
        return self._reasoned(state, [asdict(cut) for cut in cuts], sampling, drawn, started)

    async def areason(self, state: RatingState) -> Json:
        """As `reason`."""
        started = time.time()
        evidence, cuts = self._experts.fit(evidence_of(state))
        sampling = _next_round(state, knobs())
        drawn = await self._reasoner.awrite(evidence, sampling)
        return self._reasoned(state, [asdict(cut) for cut in cuts], sampling, drawn, started)

    def _reasoned(
        self,
        state: RatingState,
        cuts: list[Json],
        sampling: Sampling,
        drawn: Sequence[Rationale],
        started: float,
    ) -> Json:
        limit = self._experts.budgets.rationale
        long = [
            {"what": "rationale", "detail": f"ended at its budget of {limit} tokens"}
            for rationale in drawn
            if rationale.cut
        ]
        pairs = zip(drawn, sampling.seeds, strict=True)
        return {
            "rationales": [{"text": rationale.text, "seed": seed} for rationale, seed in pairs],
            # The evidence is the same in every round: its cuts are told once.
            "truncated": (cuts if not state["rationales"] else []) + long,
            "spans": [
                _span(
                    "reasoner",
                    started,
                    calls=len(drawn),
                    prompt_tokens=sum(r.prompt_tokens for r in drawn),
                    completion_tokens=sum(r.completion_tokens for r in drawn),
                )
            ],
        }

    # predictor -------------------------------------------------------------------------------

    def predict(self, state: RatingState) -> Json:
        """Rate with each new rationale, and mix all distributions so far."""
        started = time.time()
        rated = self._predictor.rate(*self._to_rate(state))
        return self._predicted(state, rated, started)

    async def apredict(self, state: RatingState) -> Json:
        """As `predict`."""
        started = time.time()
        rated = await self._predictor.arate(*self._to_rate(state))
        return self._predicted(state, rated, started)

    def _to_rate(self, state: RatingState) -> tuple[Evidence, list[str]]:
        evidence, _ = self._experts.fit(evidence_of(state))
        new = state["rationales"][len(state["distributions"]) :]
        return evidence, [drawn["text"] for drawn in new]

    def _predicted(self, state: RatingState, rated: Sequence[RateResult], started: float) -> Json:
        distributions = [
            {"probabilities": list(r.distribution.probabilities), "mass": r.distribution.mass}
            for r in rated
        ]
        span = _span(
            "predictor",
            started,
            calls=len(rated),
            prompt_tokens=sum(result.prompt_tokens for result in rated),
            completion_tokens=len(rated),
        )
        whole: RatingState = {
            **state,
            "distributions": [*state["distributions"], *distributions],
            "spans": [*state["spans"], span],
        }
        experts = self._experts
        result = recommend(whole, knobs(), experts.scale, experts.model_card())
        return {
            "distributions": distributions,
            "spans": [span],
            "recommendation": result.to_dict(),
        }

    def after_predictor(self, state: RatingState) -> Literal["reasoner", "__end__"]:
        """Another round of rationales, while unsure and the budget allows."""
        settings = knobs()
        enough = len(state["rationales"]) >= settings.rationales
        if enough or self._is_sure(state, settings):
            return "__end__"
        return "reasoner"

    def _is_sure(self, state: RatingState, settings: Knobs) -> bool:
        mixed = mixture(state["distributions"], self._experts.scale)
        return mixed.confidence >= settings.sure


def _summarizer_arguments(task: SummarizerTask) -> tuple[Review, str, int]:
    entry = task["entry"]
    return Review.from_dict(entry["review"]), entry["kind"], task["siblings"]


def _next_round(state: RatingState, settings: Knobs) -> Sampling:
    """One rationale is greedy; several are sampled, each with a seed of its own."""
    if settings.rationales == 1:
        return Sampling(seeds=(settings.seed,))
    done = len(state["rationales"])
    size = min(settings.round_size, settings.rationales - done)
    seeds = tuple(settings.seed * 1_000_003 + done + i for i in range(size))
    return Sampling(seeds, settings.temperature, settings.top_p, first=done)


def _span(node: str, started: float, **counts: int) -> Json:
    span: dict[str, Any] = {"node": node, "started": started, "ended": time.time()}
    span |= dict.fromkeys(("calls", "cache_hits", "prompt_tokens", "completion_tokens"), 0)
    return {**span, **counts}
