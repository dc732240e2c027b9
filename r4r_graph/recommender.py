"""The facade: what most people import.

from r4r_graph import Recommender

recommender = Recommender.load(reviews="reviews.parquet")
result = recommender.rate("mara", "glass-harbour")
print(result.rating, result.rationale)
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypedDict, Unpack

from langchain_core.runnables import RunnableConfig
from langgraph.store.base import BaseStore
from langgraph.types import Checkpointer, StreamMode

from r4r_graph.engine.base import Engine
from r4r_graph.errors import SettingError
from r4r_graph.evidence import TokenBudgets
from r4r_graph.experts import Experts
from r4r_graph.graph import Knobs, RatingGraph, RatingInput, build_graph
from r4r_graph.prompts import EXPERT_PROMPTS, prompt_digests
from r4r_graph.ratings import RatingScale, Readout
from r4r_graph.reviews import ReviewSource, TableReviewSource, load_items, load_reviews
from r4r_graph.schema import Item, Recommendation, Review, unix_seconds

if TYPE_CHECKING:
    from langgraph.store.sqlite import SqliteStore

_log = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]
Time = float | str | datetime


@dataclass(frozen=True, slots=True)
class SummaryProgress:
    """One earlier review has been summarized."""

    user_id: str
    item_id: str
    cached: bool
    """Whether its summary was there already."""
    done: int
    of: int


@dataclass(frozen=True, slots=True)
class RationaleToken:
    """A piece of a rationale, as it is written."""

    text: str
    rationale: int
    """Which one, from 0; several are written at the same time."""


Event = SummaryProgress | RationaleToken | Recommendation
"""What `Recommender.stream` yields; the recommendation comes last."""


class RunOptions(TypedDict, total=False):
    """What `rate`, `stream` and their async twins take besides the ids."""

    as_of: Time | None
    """Read only reviews strictly before this time (unix seconds, ISO 8601, datetime); default
    now."""
    item: Item | None
    """Title, category, description, where the review source does not know them."""
    user_history: Sequence[Review] | None
    """Earlier reviews by the user, instead of asking the review source."""
    item_history: Sequence[Review] | None
    config: RunnableConfig | None
    """LangGraph's own settings of a run: callbacks, tags, and the `thread_id` under which a
    checkpointer keeps it (a new one if none is given)."""
    history: int
    """This and the rest are the fields of `Knobs`."""
    rationales: int
    round_size: int
    sure: float
    readout: Readout
    seed: int
    temperature: float
    top_p: float


@dataclass(frozen=True, slots=True)
class _Run:
    given: RatingInput
    config: RunnableConfig | None
    knobs: Knobs


class Recommender:
    """Rates pairs of users and items from the reviews both received earlier.

    Made by `load`, or from parts: `Recommender(experts, reviews)`. Safe to use from many threads
    and coroutines at once: their requests share the engine's forward passes.
    """

    def __init__(
        self,
        experts: Experts,
        reviews: ReviewSource | None = None,
        *,
        checkpointer: Checkpointer = None,
    ) -> None:
        self.experts = experts
        self.reviews = reviews
        self.graph: RatingGraph = build_graph(experts, reviews, checkpointer=checkpointer)
        self._opened: SqliteStore | None = None

    @classmethod
    def load(
        cls,
        reviews: PathLike | ReviewSource | Iterable[Review] | None = None,
        items: PathLike | Mapping[str, Item] | None = None,
        base: PathLike = "smollm2-135m",
        adapters: PathLike | Mapping[str, PathLike | None] | None = None,
        *,
        scale: RatingScale | str | Sequence[float] = "1-5",
        device: str | None = None,
        dtype: str | None = None,
        quantize_4bit: bool = False,
        allow_prompt_mismatch: bool = False,
        budgets: TokenBudgets | None = None,
        engine: Engine | None = None,
        store: BaseStore | None = None,
        checkpointer: Checkpointer = None,
    ) -> Self:
        """Load reviews, base model and adapters.

        Args:
            reviews: a file (see `load_reviews`), a review source, or reviews; None if every
                call brings its own histories.
            items: a file (see `load_items`) or a mapping; titles, categories, descriptions.
            base: `smollm2-135m`, a local directory, or a Hub id.
            adapters: a directory with `summarizer/`, `reasoner/`, `predictor/` (any may be
                absent), a mapping of those names to directories, or None / `"none"`: an expert
                without an adapter answers with the base model, and the log says so.
            scale: rating values: `"1-5"`, `"1-10"`, or any rising list.
            device: `cpu` or `cuda`; None takes CUDA where there is one.
            dtype: None is float32 on a CPU, bfloat16 on CUDA.
            quantize_4bit: load the base model in 4 bits (CUDA only).
            allow_prompt_mismatch: accept adapters trained on another version of their prompt.
            budgets: token budgets of the prompts and answers.
            engine: an engine of your own, such as `fake_engine()`; base, adapters, device,
                dtype, quantize_4bit then go unused.
            store: where summaries are kept; default is a SQLite file in the cache folder.
            checkpointer: any LangGraph saver, to keep runs.

        Raises:
            DataError: reviews or items cannot be read, or a row is bad.
            ModelError: base model or adapters cannot be used.
            SettingError: a bad scale, device or budget.
        """
        parsed = scale if isinstance(scale, RatingScale) else RatingScale.parse(scale)
        source = _review_source(reviews, items, parsed)
        opened: SqliteStore | None = None
        if store is None:
            from r4r_graph.caches import open_summary_store

            store = opened = open_summary_store()
        try:
            if engine is None:
                engine = _local_engine(
                    base,
                    adapters,
                    device=device,
                    dtype=dtype,
                    quantize_4bit=quantize_4bit,
                    allow_prompt_mismatch=allow_prompt_mismatch,
                )
        except BaseException:
            if opened is not None:
                opened.conn.close()
            raise
        experts = Experts(engine, store, parsed, budgets or TokenBudgets())
        recommender = cls(experts, source, checkpointer=checkpointer)
        recommender._opened = opened
        return recommender

    def rate(self, user_id: str, item_id: str, **options: Unpack[RunOptions]) -> Recommendation:
        """How this user will rate this item, and why.

        Args:
            user_id: the user.
            item_id: the item.
            **options: see `RunOptions`; among them all fields of `Knobs`.

        Raises:
            UnknownPairError: both ids are found nowhere and no history was passed.
            InputError: any other bad input; the message names it.
            EngineError: the engine could not serve the run.
        """
        run = self._run(user_id, item_id, options)
        return _result(self.graph.invoke(run.given, run.config, context=run.knobs))

    async def arate(
        self, user_id: str, item_id: str, **options: Unpack[RunOptions]
    ) -> Recommendation:
        """As `rate`. Waiting holds no thread; cancelling frees the engine."""
        run = self._run(user_id, item_id, options)
        return _result(await self.graph.ainvoke(run.given, run.config, context=run.knobs))

    def stream(self, user_id: str, item_id: str, **options: Unpack[RunOptions]) -> Iterator[Event]:
        """As `rate`, telling what happens on the way: a `SummaryProgress` a review, each
        `RationaleToken` as it is written, the `Recommendation` last."""
        run = self._run(user_id, item_id, options)
        events = _Events()
        for part in self.graph.stream(
            run.given,
            run.config,
            context=run.knobs,
            stream_mode=_Events.MODES,
            version="v2",
        ):
            yield from events.of(part)
        yield _result(events.state)

    async def astream(
        self, user_id: str, item_id: str, **options: Unpack[RunOptions]
    ) -> AsyncIterator[Event]:
        """As `stream`."""
        run = self._run(user_id, item_id, options)
        events = _Events()
        async for part in self.graph.astream(
            run.given,
            run.config,
            context=run.knobs,
            stream_mode=_Events.MODES,
            version="v2",
        ):
            for event in events.of(part):
                yield event
        yield _result(events.state)

    def _run(self, user_id: str, item_id: str, options: RunOptions) -> _Run:
        """What the graph is called with."""
        settings: dict[str, Any] = dict(options)
        given = _run_input(user_id, item_id, settings)
        config: RunnableConfig | None = settings.pop("config", None)
        named = (config or {}).get("configurable", {})
        if self.graph.checkpointer is not None and "thread_id" not in named:
            # With a checkpointer, every run needs a thread.
            threaded: RunnableConfig = {"configurable": {**named, "thread_id": str(uuid.uuid4())}}
            config = {**(config or {}), **threaded}
        return _Run(given, config, check_knobs(settings))

    def close(self) -> None:
        """Stop the engine and free its model."""
        self.experts.engine.close()
        if self._opened is not None:
            self._opened.conn.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Events:
    """Translates the parts of a graph's stream."""

    MODES: ClassVar[list[StreamMode]] = ["messages", "custom", "values"]

    def __init__(self) -> None:
        self.state: Mapping[str, Any] = {}
        self._summaries = 0

    def of(self, part: Any) -> Iterator[Event]:
        if part["type"] == "values":
            self.state = part["data"]
        elif part["type"] == "custom" and part["data"].get("event") == "summary":
            told = part["data"]
            self._summaries += 1
            yield SummaryProgress(
                told["user_id"], told["item_id"], told["cached"], self._summaries, told["of"]
            )
        elif part["type"] == "messages":
            chunk, about = part["data"]
            if chunk.text:
                yield RationaleToken(str(chunk.text), about["rationale"])


def _local_engine(
    base: PathLike, adapters: PathLike | Mapping[str, PathLike | None] | None, **settings: Any
) -> Engine:
    """The local engine; what is amiss with its adapters goes to the log."""
    from r4r_graph.engine.local import load_local_engine

    engine, warnings = load_local_engine(
        _as_text(base), _adapter_paths(adapters), prompts=prompt_digests(), **settings
    )
    for warning in warnings:
        _log.warning("%s", warning)
    bare = [name for name in EXPERT_PROMPTS if name not in engine.info.adapters]
    if bare:
        _log.warning(
            "no adapter for %s: the base model %s answers untrained; expect valid but poor results",
            ", ".join(bare),
            engine.info.base,
        )
    return engine


def _run_input(user_id: str, item_id: str, settings: dict[str, Any]) -> RatingInput:
    """The graph's input; takes what belongs to it out of `settings`."""
    as_of, item = settings.pop("as_of", None), settings.pop("item", None)
    given = RatingInput(
        user_id=user_id,
        item_id=item_id,
        as_of=None if as_of is None else unix_seconds(as_of, what="as_of"),
        item=None if item is None else item.to_dict(),
    )
    for side in ("user_history", "item_history"):
        reviews = settings.pop(side, None)
        given[side] = None if reviews is None else [review.to_dict() for review in reviews]
    return given


def check_knobs(settings: Mapping[str, Any]) -> Knobs:
    """The knobs of a run, checked.

    Raises:
        SettingError: an unknown one, or one out of range.
    """
    unknown = sorted(set(settings) - set(Knobs.__dataclass_fields__))
    if unknown:
        known = ", ".join(Knobs.__dataclass_fields__)
        raise SettingError(f"unknown setting {', '.join(unknown)}; there are: {known}")
    return Knobs(**settings)


def _result(state: Mapping[str, Any]) -> Recommendation:
    return Recommendation.from_dict(state["recommendation"])


def _review_source(
    reviews: PathLike | ReviewSource | Iterable[Review] | None,
    items: PathLike | Mapping[str, Item] | None,
    scale: RatingScale,
) -> ReviewSource | None:
    if isinstance(items, str | os.PathLike):
        items = load_items(items)
    if isinstance(reviews, str | os.PathLike):
        return load_reviews(reviews, scale=scale, items=items)
    if reviews is None:
        return TableReviewSource.from_reviews((), items.values()) if items else None
    if isinstance(reviews, ReviewSource):
        if items is not None:
            raise SettingError("items belong to the review source: give them to it, not here")
        return reviews
    return TableReviewSource.from_reviews(
        (_checked(review, scale) for review in reviews), (items or {}).values()
    )


def _checked(review: Review, scale: RatingScale) -> Review:
    scale.check(review.rating)
    return review


def _as_text(path: PathLike) -> str:
    return os.fspath(path)


def _adapter_paths(
    adapters: PathLike | Mapping[str, PathLike | None] | None,
) -> str | Mapping[str, str | Path | None] | None:
    if adapters is None or isinstance(adapters, str | os.PathLike):
        return None if adapters is None else _as_text(adapters)
    return {name: None if path is None else _as_text(path) for name, path in adapters.items()}
