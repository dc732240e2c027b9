"""The three experts: prompt, adapter and decoding over an engine. Nothing else knows a prompt.

- `Summarizer`: one review -> an aspect summary (paper: preference distillation), cached.
- `Reasoner`: both sides' summaries, no ratings -> a rationale (preference matching).
- `Predictor`: summaries, ratings, averages, rationale -> a rating distribution (feedback
  prediction).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_executor_for_config
from langgraph.constants import TAG_NOSTREAM
from langgraph.store.base import BaseStore

from r4r_graph import prompts
from r4r_graph.engine import aspects
from r4r_graph.engine.base import (
    Engine,
    GenerateRequest,
    GenerateResult,
    Message,
    RateRequest,
    RateResult,
    TokenMeter,
)
from r4r_graph.engine.chat import EngineChatModel
from r4r_graph.errors import EngineFailure, SettingError
from r4r_graph.evidence import (
    DEFAULT_KIND,
    HISTORY,
    Evidence,
    TokenBudgets,
    evidence_inputs,
    fit_evidence,
    shortened,
    without_ratings,
)
from r4r_graph.ratings import RatingScale
from r4r_graph.schema import AspectSummary, Review, Truncation, plain_number
from r4r_graph.summaries import SummaryCache

Messages = tuple[Message, Message, Message]
"""The three turns of an expert's prompt: system, context, task."""

NO_REPEAT = 8
"""No run of so many tokens stands in a rationale twice: small models go round in circles, and a
reason does not get better by being said again."""

RatingCase = tuple[Evidence, str | None]
"""What the predictor rates: evidence, and a rationale or none."""

_Call = tuple[list[BaseMessage], dict[str, Any]]

_SENTENCE_END = re.compile(r"""[.!?…]["'”’)]*(?=\s|$)|[。！？]""")

_MOST_THREADS = 64
"""That wait for the chat model at a time."""


@dataclass(frozen=True, slots=True)
class Summarized:
    """An aspect summary and what it cost."""

    summary: AspectSummary
    cached: bool
    truncated: tuple[Truncation, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Rationale:
    """A rationale and what it cost."""

    text: str
    cut: bool
    """Whether it ran into its token budget. The text then ends with its last whole sentence, if it
    has one: half a sentence tells neither a person nor the predictor anything."""
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a round of rationales is drawn: one a seed."""

    seeds: tuple[int, ...] = (0,)
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    first: int = 0
    """Number of the round's first rationale; each stream of tokens carries its own as metadata."""
    siblings: int = 1
    """How many such rounds, of other runs, are drawn at the same moment; see `GenerateRequest`."""


class Summarizer:
    """Summarizes single reviews, always greedily, each once (see `SummaryCache`)."""

    def __init__(
        self, engine: Engine, cache: SummaryCache, scale: RatingScale, budgets: TokenBudgets
    ) -> None:
        self._engine = engine
        self._cache = cache
        self._scale = scale
        self._budgets = budgets

    @property
    def unkept(self) -> Exception | None:
        """Why the latest summary that could not be kept was not."""
        return self._cache.unkept

    def request(
        self, review: Review, kind: str = "", siblings: int = 1
    ) -> tuple[GenerateRequest, tuple[Truncation, ...]]:
        """The engine's request for this review, and what had to be cut."""
        messages, cut = summarizer_prompt(
            review, kind, self._scale, self._engine.meter, self._budgets
        )
        request = GenerateRequest(
            messages=messages,
            adapter=_adapter(self._engine, "summarizer"),
            max_tokens=self._budgets.summary,
            format="aspects",
            siblings=siblings,
        )
        where = f"review of {review.item_id} by {review.user_id}: {cut}"
        return request, (Truncation("review", where),) if cut else ()

    def summarize(self, review: Review, kind: str = "", siblings: int = 1) -> Summarized:
        """The summary of one review, from the cache if it is there."""
        request, truncated = self.request(review, kind, siblings)
        made: list[GenerateResult] = []

        def compute() -> dict[str, Any]:
            made.extend(self._engine.generate([request]))
            return _parsed(made[-1].text)

        key = self._engine.fingerprint(request)
        return self._summarized(*self._cache.get_or_compute(key, compute), truncated, made)

    async def asummarize(self, review: Review, kind: str = "", siblings: int = 1) -> Summarized:
        """As `summarize`."""
        request, truncated = self.request(review, kind, siblings)
        made: list[GenerateResult] = []

        async def compute() -> dict[str, Any]:
            made.extend(await self._engine.agenerate([request]))
            return _parsed(made[-1].text)

        key = self._engine.fingerprint(request)
        return self._summarized(*await self._cache.aget_or_compute(key, compute), truncated, made)

    @staticmethod
    def _summarized(
        value: Mapping[str, Any],
        cached: bool,
        truncated: tuple[Truncation, ...],
        made: Sequence[GenerateResult],
    ) -> Summarized:
        return Summarized(
            AspectSummary.from_dict(value),
            cached,
            truncated,
            prompt_tokens=sum(result.prompt_tokens for result in made),
            completion_tokens=sum(result.completion_tokens for result in made),
        )


class Reasoner:
    """Writes rationales through a chat model, so that a graph can stream their tokens."""

    def __init__(self, model: BaseChatModel, meter: TokenMeter, budgets: TokenBudgets) -> None:
        self._model = model
        self._meter = meter
        self._budgets = budgets

    def turns(self, evidence: Evidence) -> Messages:
        """The prompt. It holds no rating of any kind."""
        return reasoner_prompt(evidence, self._meter)

    def messages(self, evidence: Evidence) -> list[BaseMessage]:
        """The prompt, as chat models take it."""
        system, context, task = self.turns(evidence)
        return [
            SystemMessage(system.content),
            HumanMessage(context.content),
            HumanMessage(task.content),
        ]

    def write(self, evidence: Evidence, sampling: Sampling = Sampling()) -> list[Rationale]:
        """One rationale a seed, in the seeds' order. Their tokens are streamed."""
        return self._answers(self._calls([evidence], sampling))

    async def awrite(self, evidence: Evidence, sampling: Sampling = Sampling()) -> list[Rationale]:
        """As `write`."""
        return await self._aanswers(self._calls([evidence], sampling))

    def write_each(
        self, evidences: Sequence[Evidence], sampling: Sampling
    ) -> list[list[Rationale]]:
        """As `write` for each evidence, all at once; these tokens are in no stream."""
        return _parted(self._answers(self._calls(evidences, sampling, silent=True)), sampling)

    async def awrite_each(
        self, evidences: Sequence[Evidence], sampling: Sampling
    ) -> list[list[Rationale]]:
        """As `write_each`."""
        calls = self._calls(evidences, sampling, silent=True)
        return _parted(await self._aanswers(calls), sampling)

    def _calls(
        self, evidences: Sequence[Evidence], sampling: Sampling, *, silent: bool = False
    ) -> list[_Call]:
        """What the model is called with, once an evidence and seed."""
        count = len(evidences) * len(sampling.seeds) * sampling.siblings
        calls: list[_Call] = []
        for messages in map(self.messages, evidences):
            for number, seed in enumerate(sampling.seeds, start=sampling.first):
                config = RunnableConfig(metadata={"rationale": number})
                if silent:
                    config["tags"] = [TAG_NOSTREAM]
                settings = {
                    "config": config,
                    "max_tokens": self._budgets.rationale,
                    "temperature": sampling.temperature,
                    "top_p": sampling.top_p,
                    "seed": seed,
                    "siblings": count,
                }
                calls.append((messages, settings))
        return calls

    def _answers(self, calls: Sequence[_Call]) -> list[Rationale]:
        if len(calls) < 2:
            return [_rationale(self._model.invoke(each, **settings)) for each, settings in calls]
        with get_executor_for_config({"max_concurrency": min(len(calls), _MOST_THREADS)}) as pool:
            answers = pool.map(lambda call: self._model.invoke(call[0], **call[1]), calls)
            return list(map(_rationale, answers))

    async def _aanswers(self, calls: Sequence[_Call]) -> list[Rationale]:
        answers = await asyncio.gather(
            *(self._model.ainvoke(each, **settings) for each, settings in calls)
        )
        return list(map(_rationale, answers))


class Predictor:
    """Rates a pair, once a rationale, each in one forward pass."""

    def __init__(self, engine: Engine, scale: RatingScale, budgets: TokenBudgets) -> None:
        self._engine = engine
        self._budgets = budgets
        self.scale = scale

    def request(self, evidence: Evidence, rationale: str | None, siblings: int = 1) -> RateRequest:
        """The engine's request; without a rationale the prompt has no place for one."""
        return RateRequest(
            messages=predictor_prompt(
                evidence, rationale, self.scale, self._engine.meter, self._budgets
            ),
            scale=self.scale,
            adapter=_adapter(self._engine, "predictor"),
            siblings=siblings,
        )

    def rate(
        self, evidence: Evidence, rationales: Sequence[str | None], siblings: int = 1
    ) -> list[RateResult]:
        """One distribution a rationale; `siblings` runs ask for as many at the same moment."""
        return self.rate_cases([(evidence, text) for text in rationales], siblings)

    async def arate(
        self, evidence: Evidence, rationales: Sequence[str | None], siblings: int = 1
    ) -> list[RateResult]:
        """As `rate`."""
        return await self.arate_cases([(evidence, text) for text in rationales], siblings)

    def rate_cases(self, cases: Sequence[RatingCase], siblings: int = 1) -> list[RateResult]:
        """One distribution a case, in one call of the engine."""
        return self._engine.rate(self._requests(cases, siblings))

    async def arate_cases(self, cases: Sequence[RatingCase], siblings: int = 1) -> list[RateResult]:
        """As `rate_cases`."""
        return await self._engine.arate(self._requests(cases, siblings))

    def _requests(self, cases: Sequence[RatingCase], siblings: int) -> list[RateRequest]:
        count = len(cases) * siblings
        return [self.request(evidence, text, count) for evidence, text in cases]


@dataclass(frozen=True)
class Experts:
    """The three experts over one engine, or each over one of its own."""

    engine: Engine
    store: BaseStore | None = None
    """Where summaries are kept; None keeps none."""
    scale: RatingScale = field(default_factory=RatingScale)
    budgets: TokenBudgets = field(default_factory=TokenBudgets)
    others: Mapping[str, Engine] = field(default_factory=dict)
    """Engines for single experts, by the expert's name, in the place of `engine`."""

    def __post_init__(self) -> None:
        """Refuse an engine for nobody.

        Raises:
            SettingError: an unknown expert.
        """
        if unknown := sorted(set(self.others) - set(prompts.EXPERT_PROMPTS)):
            raise SettingError(
                f"no expert is called {unknown[0]!r}: engines are for "
                f"{', '.join(prompts.EXPERT_PROMPTS)}"
            )

    def engine_of(self, expert: str) -> Engine:
        """The engine that answers for this expert."""
        return self.others.get(expert, self.engine)

    @property
    def history(self) -> int:
        """Latest reviews to read on each side where a run does not say: as in training."""
        known: int = self.engine.info.trained_with.get("history", HISTORY)
        return known

    @cached_property
    def summarizer(self) -> Summarizer:
        """One a bundle: its cache joins concurrent misses."""
        engine = self.engine_of("summarizer")
        return Summarizer(engine, SummaryCache(self.store), self.scale, self.budgets)

    @cached_property
    def reasoner(self) -> Reasoner:
        """Behind a chat model, for streaming."""
        engine = self.engine_of("reasoner")
        chat = EngineChatModel(
            engine=engine, adapter=_adapter(engine, "reasoner"), no_repeat=NO_REPEAT
        )
        return Reasoner(chat, engine.meter, self.budgets)

    @cached_property
    def predictor(self) -> Predictor:
        """On the bundle's scale."""
        return Predictor(self.engine_of("predictor"), self.scale, self.budgets)

    def model_card(self) -> dict[str, Any]:
        """Base model, adapters and prompt digests, as a recommendation reports them; where experts
        have engines of their own, also what those are."""
        info = self.engine.info
        adapters = {
            name: self.engine_of(name).info.adapters.get(name) for name in prompts.EXPERT_PROMPTS
        }
        others = {
            name: {"base": engine.info.base, "digest": engine.info.digest}
            for name, engine in sorted(self.others.items())
        }
        return {
            "base": info.base,
            "base_digest": info.digest,
            "device": info.device,
            "dtype": info.dtype,
            "adapters": adapters,
            "prompts": prompts.prompt_digests(),
            **({"others": others} if others else {}),
        }

    def close(self) -> None:
        """Close all engines."""
        for engine in {id(each): each for each in (self.engine, *self.others.values())}.values():
            engine.close()

    def fit(self, evidence: Evidence) -> tuple[Evidence, tuple[Truncation, ...]]:
        """See `fit_evidence`."""
        return fit_evidence(evidence, self.engine.meter, self.budgets)


def summarizer_prompt(
    review: Review, kind: str, scale: RatingScale, meter: TokenMeter, budgets: TokenBudgets
) -> tuple[Messages, str]:
    """The summarizer's turns for one review, and in words what was cut of it (empty: nothing).

    This and the two functions below render every prompt, at inference and in training.
    """
    text, cut = shortened(review.text, meter, budgets.review)
    inputs = {
        "kind": shortened(kind or DEFAULT_KIND, meter, budgets.title)[0],
        "title": shortened(review.title, meter, budgets.title)[0],
        "rating": plain_number(round(review.rating, 2)),
        "scale_low": plain_number(scale.low),
        "scale_high": plain_number(scale.high),
        "review": text,
    }
    return _messages(prompts.render("summarizer", inputs, meter.special_tokens)), cut


def reasoner_prompt(evidence: Evidence, meter: TokenMeter) -> Messages:
    """The reasoner's turns. They hold no rating of any kind."""
    inputs = without_ratings(evidence_inputs(evidence))
    return _messages(prompts.render("reasoner", inputs, meter.special_tokens))


def predictor_prompt(
    evidence: Evidence,
    rationale: str | None,
    scale: RatingScale,
    meter: TokenMeter,
    budgets: TokenBudgets,
) -> Messages:
    """The predictor's turns; without a rationale the prompt has no place for one."""
    expected = evidence.expected
    inputs = {
        **evidence_inputs(evidence),
        "expected": None if expected is None else min(max(expected, scale.low), scale.high),
        "rationale": shortened(rationale or "", meter, budgets.rationale)[0],
        "labels": list(scale.labels),
    }
    return _messages(prompts.render("predictor", inputs, meter.special_tokens))


def whole_sentences(text: str) -> str:
    """The sentences of a text that was cut, without the begun one; a text without any whole one
    stays as it is."""
    ends = [found.end() for found in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else text


def _adapter(engine: Engine, expert: str) -> str | None:
    """The expert's adapter if it is loaded; else the base model answers."""
    return expert if expert in engine.info.adapters else None


def _messages(rendered: prompts.RenderedPrompt) -> Messages:
    return (
        Message("system", rendered.system),
        Message("user", rendered.context),
        Message("user", rendered.task),
    )


def _parsed(text: str) -> dict[str, Any]:
    """The summary in an answer. Engines enforce the format; one that does not has failed."""
    try:
        return aspects.parse_aspects(_whole(text)).to_dict()
    except ValueError as error:
        raise EngineFailure(f"the engine left the summarizer's format: {error}") from error


def _whole(text: str) -> str:
    """A model's text without the halves of characters that a server's JSON may spell: no store
    and no page can hold them."""
    return text.encode(errors="replace").decode()


def _parted(drawn: Sequence[Rationale], sampling: Sampling) -> list[list[Rationale]]:
    """Those of each evidence by themselves."""
    size = len(sampling.seeds)
    return [list(drawn[at : at + size]) for at in range(0, len(drawn), size)]


def _rationale(answer: AIMessage) -> Rationale:
    usage: Mapping[str, Any] = answer.usage_metadata or {}
    text = _whole(str(answer.text)).strip()
    cut = answer.response_metadata.get("finish_reason") == "length"
    return Rationale(
        text=whole_sentences(text) if cut else text,
        cut=cut,
        prompt_tokens=usage.get("input_tokens", 0),
        completion_tokens=usage.get("output_tokens", 0),
    )
