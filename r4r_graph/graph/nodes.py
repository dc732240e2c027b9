"""The steps of the graph. Each takes the state and returns an update of it.

A step that asks the engine has two bodies, one that waits and one that awaits, around the same
preparation and the same update; the awaiting one holds no thread.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

from langgraph.runtime import get_runtime
from langgraph.types import Overwrite, Send, interrupt

from r4r_graph.engine.aspects import format_aspects
from r4r_graph.engine.base import RateResult
from r4r_graph.evidence import Evidence
from r4r_graph.experts import Experts, RatingCase, Rationale, Sampling, Summarized
from r4r_graph.graph import human, influence, rounds
from r4r_graph.graph import recall as rules
from r4r_graph.graph.influence import Plan
from r4r_graph.graph.outcome import confidence, evidence_of, mixture, recommend
from r4r_graph.graph.records import record, span
from r4r_graph.graph.state import Json, RatingState, SummarizerTask, knobs, knobs_of
from r4r_graph.reviews import ReviewSource
from r4r_graph.schema import Review, Truncation


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
        settings = knobs().settled(self._experts.history)
        update = rules.recall(state, settings, self._reviews, self._experts.scale)
        fresh = ("rationales", "distributions", "truncated", "spans", "answers", "records")
        return {
            **update,
            "summaries": Overwrite({}),
            **{name: Overwrite([]) for name in fresh},
            "influence": [],
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
        recorded = knobs_of(state).record
        tasks = [
            Send("summarizer", SummarizerTask(entry=entry, siblings=len(entries), record=recorded))
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

    def _summarized(self, task: SummarizerTask, made: Summarized, started: float) -> Json:
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
                span(
                    "summarizer",
                    started,
                    calls=int(not made.cached),
                    cache_hits=int(made.cached),
                    prompt_tokens=made.prompt_tokens,
                    completion_tokens=made.completion_tokens,
                )
            ],
            "records": self._read(task, made, started) if task["record"] else [],
        }

    def _read(self, task: SummarizerTask, made: Summarized, started: float) -> list[Json]:
        request, _ = self._summarizer.request(*_summarizer_arguments(task))
        return [
            record(
                "summarizer",
                started,
                request.messages,
                format_aspects(made.summary),
                prompt_tokens=made.prompt_tokens,
                completion_tokens=made.completion_tokens,
                key=task["entry"]["key"],
                cached=made.cached,
            )
        ]

    # reasoner --------------------------------------------------------------------------------

    def reason(self, state: RatingState) -> Json:
        """Write the next round of rationales."""
        started = time.time()
        evidence, cuts = self._experts.fit(evidence_of(state))
        sampling = rounds.next_round(state)
        drawn = self._reasoner.write(evidence, sampling)
        return self._reasoned(state, evidence, cuts, sampling, drawn, started)

    async def areason(self, state: RatingState) -> Json:
        """As `reason`."""
        started = time.time()
        evidence, cuts = self._experts.fit(evidence_of(state))
        sampling = rounds.next_round(state)
        drawn = await self._reasoner.awrite(evidence, sampling)
        return self._reasoned(state, evidence, cuts, sampling, drawn, started)

    def _reasoned(
        self,
        state: RatingState,
        evidence: Evidence,
        cuts: Sequence[Truncation],
        sampling: Sampling,
        drawn: Sequence[Rationale],
        started: float,
    ) -> Json:
        limit = self._experts.budgets.rationale
        told = bool(state["rationales"]) or human.refused(state) > 0
        long = {"what": "rationale", "detail": f"ended at its budget of {limit} tokens"}
        pairs = zip(drawn, sampling.seeds, strict=True)
        return {
            "rationales": [{"text": rationale.text, "seed": seed} for rationale, seed in pairs],
            # The evidence is the same in every round: its cuts are told once.
            "truncated": [
                *([] if told else [asdict(cut) for cut in cuts]),
                *(long for rationale in drawn if rationale.cut),
            ],
            "spans": [
                span(
                    "reasoner",
                    started,
                    calls=len(drawn),
                    prompt_tokens=sum(r.prompt_tokens for r in drawn),
                    completion_tokens=sum(r.completion_tokens for r in drawn),
                )
            ],
            "records": [
                record(
                    "reasoner",
                    started,
                    self._reasoner.turns(evidence),
                    rationale.text,
                    prompt_tokens=rationale.prompt_tokens,
                    completion_tokens=rationale.completion_tokens,
                )
                for rationale in drawn
                if knobs_of(state).record
            ],
        }

    def after_reasoner(self, state: RatingState) -> Literal["human", "predictor"]:
        """To a person, where they want to see the rationale first."""
        return "human" if knobs_of(state).ask else "predictor"

    # human -----------------------------------------------------------------------------------

    def human(self, state: RatingState) -> Json:
        """Ask a person, and do as they say. Before the interrupt nothing is computed: when the
        run is resumed, this step begins again."""
        scale, asked = self._experts.scale, human.question(state)
        answer = human.plain_answer(interrupt(asked))
        while (wrong := human.fault(answer, asked, scale)) is not None:
            answer = human.plain_answer(interrupt({**asked, "fault": wrong}))
        kept = human.decided(answer, asked)
        update: Json = {"answers": [kept]}
        rationales = human.rationales_after(state, kept)
        if rationales is not None:
            update["rationales"] = Overwrite(rationales)
        if asked["about"] == "rating":
            whole: RatingState = {**state, "answers": [*state["answers"], kept]}
            update["recommendation"] = self._recommended(whole)
        return update

    def after_human(
        self, state: RatingState
    ) -> Literal["reasoner", "predictor", "influence", "__end__"]:
        """On to the predictor, back for another rationale, or towards the end."""
        if state["answers"][-1]["action"] == "refuse":
            return "reasoner"
        return "predictor" if human.unrated(state) else self._last(state)

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

    def _to_rate(self, state: RatingState) -> tuple[Evidence, list[str], int]:
        evidence, _ = self._experts.fit(evidence_of(state))
        texts = [drawn["text"] for drawn in human.unrated(state)]
        return evidence, texts, state["case"].get("siblings", 1)

    def _predicted(self, state: RatingState, rated: Sequence[RateResult], started: float) -> Json:
        distributions: list[Json] = [
            {
                "probabilities": list(r.distribution.probabilities),
                "mass": r.distribution.mass,
                **({} if r.source == "logits" else {"source": r.source}),
            }
            for r in rated
        ]
        cost = span(
            "predictor",
            started,
            calls=len(rated),
            prompt_tokens=sum(result.prompt_tokens for result in rated),
            completion_tokens=sum(result.completion_tokens for result in rated),
        )
        whole: RatingState = {
            **state,
            "distributions": [*state["distributions"], *distributions],
            "spans": [*state["spans"], cost],
        }
        return {
            "distributions": distributions,
            "spans": [cost],
            "records": self._rated(state, rated, started) if knobs_of(state).record else [],
            "recommendation": self._recommended(whole),
        }

    def _rated(self, state: RatingState, rated: Sequence[RateResult], started: float) -> list[Json]:
        evidence, texts, _ = self._to_rate(state)
        return [
            record(
                "predictor",
                started,
                self._predictor.request(evidence, text).messages,
                {
                    "probabilities": list(result.distribution.probabilities),
                    "mass": result.distribution.mass,
                },
                prompt_tokens=result.prompt_tokens,
                completion_tokens=1,
            )
            for text, result in zip(texts, rated, strict=True)
        ]

    def _recommended(self, state: RatingState) -> Json:
        experts = self._experts
        return recommend(state, knobs_of(state), experts.scale, experts.model_card()).to_dict()

    def after_predictor(
        self, state: RatingState
    ) -> Literal["reasoner", "human", "influence", "__end__"]:
        """Another round of rationales, while unsure and the budget allows; then to a person, where
        it is less sure than they ask for."""
        settings, sure = knobs_of(state), confidence(state)
        if len(state["rationales"]) < settings.rationales and sure < settings.sure:
            return "reasoner"
        return "human" if sure < settings.ask_below else self._last(state)

    @staticmethod
    def _last(state: RatingState) -> Literal["influence", "__end__"]:
        return "__end__" if knobs_of(state).influence == "none" else "influence"

    # influence -------------------------------------------------------------------------------

    def influence(self, state: RatingState) -> Json:
        """Rate once more without each thing that was read."""
        started = time.time()
        plan = self._plan(state)
        fresh = self._reasoner.write_each(plan.to_write, plan.anew) if plan.anew else []
        cases = plan.cases(fresh)
        rated = self._predictor.rate_cases([case for some in cases for case in some])
        return self._influenced(state, plan, fresh, cases, rated, started)

    async def ainfluence(self, state: RatingState) -> Json:
        """As `influence`."""
        started = time.time()
        plan = self._plan(state)
        fresh = await self._reasoner.awrite_each(plan.to_write, plan.anew) if plan.anew else []
        cases = plan.cases(fresh)
        rated = await self._predictor.arate_cases([case for some in cases for case in some])
        return self._influenced(state, plan, fresh, cases, rated, started)

    def _plan(self, state: RatingState) -> Plan:
        evidence, _ = self._experts.fit(evidence_of(state))
        anew = rounds.drawn_again(state) if knobs_of(state).influence == "new" else None
        return Plan(influence.left_out(evidence), state["rationales"], anew)

    def _influenced(
        self,
        state: RatingState,
        plan: Plan,
        fresh: Sequence[Sequence[Rationale]],
        cases: Sequence[Sequence[RatingCase]],
        rated: Sequence[RateResult],
        started: float,
    ) -> Json:
        results = iter(rated)
        written = [rationale for some in fresh for rationale in some]
        by_part = [[next(results) for _ in some] for some in cases]
        mean = mixture(state["distributions"], self._experts.scale).mean
        found = [one.to_dict() for one in influence.influences(plan.parts, by_part, mean)]
        cost = span(
            "influence",
            started,
            calls=len(rated) + len(written),
            prompt_tokens=sum(r.prompt_tokens for r in rated)
            + sum(r.prompt_tokens for r in written),
            completion_tokens=len(rated) + sum(r.completion_tokens for r in written),
        )
        whole: RatingState = {**state, "influence": found, "spans": [*state["spans"], cost]}
        return {"influence": found, "spans": [cost], "recommendation": self._recommended(whole)}


def _summarizer_arguments(task: SummarizerTask) -> tuple[Review, str, int]:
    entry = task["entry"]
    return Review.from_dict(entry["review"]), entry["kind"], task["siblings"]
