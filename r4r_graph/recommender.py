"""The facade: what most people import.

from r4r_graph import Recommender

recommender = Recommender.load(reviews="reviews.parquet")
result = recommender.rate("mara", "glass-harbour")
print(result.rating, result.rationale)
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack

from langchain_core.runnables import RunnableConfig
from langgraph.store.base import BaseStore
from langgraph.types import Checkpointer, StateSnapshot

from r4r_graph import forks, runs
from r4r_graph.engine.contexts import CONTEXT_CACHE_MB
from r4r_graph.errors import SettingError
from r4r_graph.events import (
    MODES,
    Answer,
    Event,
    Events,
    Question,
    RationaleToken,
    SummaryProgress,
    ended,
    read_by_task,
)
from r4r_graph.evidence import TokenBudgets
from r4r_graph.experts import Experts
from r4r_graph.graph import Knobs, RatingGraph, RatingInput, build_graph
from r4r_graph.graph import rank as ranking
from r4r_graph.graph.limits import starting_now
from r4r_graph.graph.rank import Candidates, RankingGraph
from r4r_graph.graph.recall import checked_id, plain_history, plain_item
from r4r_graph.graph.state import Influences, check_knobs
from r4r_graph.loading import (
    AnyEngine,
    PathLike,
    budgets_of,
    open_engines,
    review_source,
)
from r4r_graph.ranking import CandidateProgress, Ranking
from r4r_graph.ratings import RatingScale, Readout
from r4r_graph.reviews import ReviewSource
from r4r_graph.schema import Item, Recommendation, Review, unix_seconds

if TYPE_CHECKING:
    from langchain_core.tools import BaseTool
    from langgraph.store.sqlite import SqliteStore

__all__ = [
    "Answer",
    "Event",
    "Question",
    "RationaleToken",
    "Recommender",
    "RunOptions",
    "SummaryProgress",
    "check_knobs",
]

_log = logging.getLogger(__name__)

Time = float | str | datetime


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
    history: int | None
    """This and the rest are the fields of `Knobs`."""
    rationales: int
    round_size: int
    sure: float
    readout: Readout
    seed: int
    temperature: float
    top_p: float
    ask: bool
    ask_below: float
    influence: Influences
    record: bool
    timeout: float | None


@dataclass(frozen=True, slots=True)
class _Run:
    """What the graph is called with."""

    given: Any
    """The input of a new run; a `Command` with a person's answer; None goes on where a run
    stopped."""
    config: RunnableConfig | None
    knobs: Knobs

    @property
    def thread_id(self) -> str:
        """Under which it is kept, if it is."""
        return str((self.config or {}).get("configurable", {}).get("thread_id", ""))


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
        context_cache_mb: int = CONTEXT_CACHE_MB,
        allow_prompt_mismatch: bool = False,
        budgets: TokenBudgets | None = None,
        engine: AnyEngine | None = None,
        experts: Mapping[str, AnyEngine] | None = None,
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
                absent), a mapping of those names to directories, or `"none"`: an expert without
                an adapter answers with the base model, and the log says so. None takes those that
                come with the package for this base model, if there are any.
            scale: rating values: `"1-5"`, `"1-10"`, or any rising list.
            device: `cpu` or `cuda`; None takes CUDA where there is one.
            dtype: None is float32 on a CPU, bfloat16 on CUDA.
            quantize_4bit: load the base model in 4 bits (CUDA only).
            context_cache_mb: MiB of the latest contexts that the local engine keeps, so that
                prompts which begin alike are read once; 0 reads each from its beginning.
            allow_prompt_mismatch: accept adapters trained on another version of their prompt.
            budgets: token budgets of the prompts and answers; None takes those that the adapters
                were trained with, where they say so.
            engine: what answers instead of a model in this process: the address of a model
                server (`"http://127.0.0.1:8000"`; base and adapters are those that it serves), a
                LangChain chat model or its `provider:name`, or an engine of your own, such as
                `fake_engine()`. device, dtype and quantize_4bit then go unused.
            experts: the same for single experts, by name: `{"reasoner": ChatOpenAI(...)}`.
            store: where summaries are kept; default is a SQLite file in the cache folder.
            checkpointer: any LangGraph saver, to keep runs.

        Raises:
            DataError: reviews or items cannot be read, or a row is bad.
            ModelError: base model or adapters cannot be used.
            SettingError: a bad scale, device, budget or engine.
            EngineError: a model server cannot be reached.
        """
        parsed = scale if isinstance(scale, RatingScale) else RatingScale.parse(scale)
        source = review_source(reviews, items, parsed)
        opened: SqliteStore | None = None
        if store is None:
            from r4r_graph.caches import open_summary_store

            store = opened = open_summary_store()
        try:
            opened_engine, others = open_engines(
                engine,
                experts,
                base,
                adapters,
                device=device,
                dtype=dtype,
                quantize_4bit=quantize_4bit,
                context_cache_mb=context_cache_mb,
                allow_prompt_mismatch=allow_prompt_mismatch,
            )
        except BaseException:
            if opened is not None:
                opened.conn.close()
            raise
        budgets = budgets or budgets_of(opened_engine)
        bundle = Experts(opened_engine, store, parsed, budgets, others)
        recommender = cls(bundle, source, checkpointer=checkpointer)
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
            RunTimeoutError: it took longer than `timeout`.
            RunPausedError: the run waits for a person (`ask`, `ask_below`); `resume` it.
        """
        return self._invoke(self._run(user_id, item_id, options))

    async def arate(
        self, user_id: str, item_id: str, **options: Unpack[RunOptions]
    ) -> Recommendation:
        """As `rate`. Waiting holds no thread; cancelling frees the engine."""
        return await self._ainvoke(self._run(user_id, item_id, options))

    def stream(self, user_id: str, item_id: str, **options: Unpack[RunOptions]) -> Iterator[Event]:
        """As `rate`, telling what happens on the way: a `SummaryProgress` a review, each
        `RationaleToken` as it is written, and last the `Recommendation`, or the `Question` that
        the run waits with."""
        return self._stream(self._run(user_id, item_id, options))

    async def astream(
        self, user_id: str, item_id: str, **options: Unpack[RunOptions]
    ) -> AsyncGenerator[Event]:
        """As `stream`."""
        async with aclosing(self._astream(self._run(user_id, item_id, options))) as events:
            async for event in events:
                yield event

    def resume(
        self, thread_id: str, answer: Answer | None = None, config: RunnableConfig | None = None
    ) -> Recommendation:
        """Go on with a run that a checkpointer kept: with a person's answer where it waits for
        one, and where it failed or its process ended from its last step, work done not repeated.

        Args:
            thread_id: the run. One that another process is at work on must not be resumed.
            answer: where it waits for one.
            config: as in `RunOptions`; its thread id is not looked at.

        Raises:
            UnknownRunError: there is no such run.
            InputError: it is finished, an answer is given where none is asked for or none where
                one is, or one that is not allowed.
            SettingError: the recommender has no checkpointer.
            RunPausedError: it waits again.
            EngineError: the engine could not serve the run.
        """
        kept = runs.find(self.graph, thread_id)
        return self._invoke(self._resumed(kept, thread_id, answer, config))

    async def aresume(
        self, thread_id: str, answer: Answer | None = None, config: RunnableConfig | None = None
    ) -> Recommendation:
        """As `resume`."""
        kept = await runs.afind(self.graph, thread_id)
        return await self._ainvoke(self._resumed(kept, thread_id, answer, config))

    def stream_resumed(
        self, thread_id: str, answer: Answer | None = None, config: RunnableConfig | None = None
    ) -> Iterator[Event]:
        """As `resume`, with the events of `stream`."""
        kept = runs.find(self.graph, thread_id)
        return self._stream(self._resumed(kept, thread_id, answer, config))

    async def astream_resumed(
        self, thread_id: str, answer: Answer | None = None, config: RunnableConfig | None = None
    ) -> AsyncGenerator[Event]:
        """As `stream_resumed`."""
        kept = await runs.afind(self.graph, thread_id)
        run = self._resumed(kept, thread_id, answer, config)
        async with aclosing(self._astream(run)) as events:
            async for event in events:
                yield event

    def fork(self, thread_id: str, changes: forks.Changes, *, at: str | int | None = None) -> str:
        """A new run out of an earlier one: its state after a step, changed. Nothing runs yet:
        `resume` the thread that is returned. See `r4r_graph.forks.fork`."""
        return forks.fork(self.graph, thread_id, changes, at=at)

    async def afork(
        self, thread_id: str, changes: forks.Changes, *, at: str | int | None = None
    ) -> str:
        """As `fork`."""
        return await asyncio.to_thread(self.fork, thread_id, changes, at=at)

    def _called_with(self, run: _Run) -> dict[str, Any]:
        # What a step has done is kept before the next one begins: a killed run repeats nothing.
        kept = {"durability": "sync"} if runs.keeps_runs(self.graph) else {}
        config = starting_now(run.config, run.knobs.timeout)
        return {"config": config, "context": run.knobs, "version": "v2", **kept}

    def _invoke(self, run: _Run) -> Recommendation:
        end = self.graph.invoke(run.given, **self._called_with(run))
        return ended(end.value, end.interrupts, run.thread_id)

    async def _ainvoke(self, run: _Run) -> Recommendation:
        end = await self.graph.ainvoke(run.given, **self._called_with(run))
        return ended(end.value, end.interrupts, run.thread_id)

    def _stream(self, run: _Run) -> Iterator[Event]:
        events = Events(run.thread_id)
        options = self._called_with(run)
        if most := (run.config or {}).get("max_concurrency"):
            # LangGraph waits for what nodes write on a thread out of the same number.
            options["config"] = {**options["config"], "max_concurrency": most + 1}
        for part in self.graph.stream(run.given, stream_mode=MODES, **options):
            yield from events.of(part)
        yield events.last()

    async def _astream(self, run: _Run) -> AsyncGenerator[Event]:
        events = Events(run.thread_id)
        options = self._called_with(run)
        running = self.graph.astream(run.given, stream_mode=MODES, **options)
        async with aclosing(read_by_task(running)) as parts:
            async for part in parts:
                for event in events.of(part):
                    yield event
        yield events.last()

    def _run(self, user_id: str, item_id: str, options: RunOptions) -> _Run:
        settings: dict[str, Any] = dict(options)
        given = _run_input(user_id, item_id, settings)
        config: RunnableConfig | None = settings.pop("config", None)
        knobs = check_knobs(settings)
        if runs.keeps_runs(self.graph):
            # With a checkpointer, every run needs a thread.
            named = (config or {}).get("configurable", {}).get("thread_id", str(uuid.uuid4()))
            checked_id(str(named), "thread_id")
            model = runs.model_label(self.experts.model_card())
            labels = {**runs.labels(user_id, item_id, asdict(knobs)), **model}
            config = _kept_as(named, labels, config)
        elif knobs.ask or knobs.ask_below:
            raise SettingError(
                "a run that asks a person has to be kept while it waits: load the recommender "
                "with a checkpointer"
            )
        return _Run(given, config, knobs)

    def _resumed(
        self,
        kept: StateSnapshot,
        thread_id: str,
        answer: Answer | None,
        config: RunnableConfig | None,
    ) -> _Run:
        given = runs.continuation(kept, thread_id, answer, self.experts.scale)
        if not runs.same_model(kept, self.experts.model_card()):
            _log.warning("run %s began with another model, or other prompts", thread_id)
        config = _kept_as(thread_id, runs.labels_of(kept), config)
        return _Run(given, config, runs.knobs_of_run(kept))

    @cached_property
    def ranking_graph(self) -> RankingGraph:
        """What `rank` runs; it keeps no runs, as `build_ranking_graph` with a checkpointer does."""
        return ranking.build_ranking_graph(self.experts, self.reviews, checkpointer=False)

    def rank(
        self, user_id: str, items: Candidates, top_k: int | None = 10, **options: Unpack[RunOptions]
    ) -> Ranking:
        """The items that this user will like best, best mean rating first; see `ranking.Ranking`.

        Args:
            user_id: the user.
            items: the candidates, by id or as `Item`s; one that comes again is rated once.
            top_k: how many to return; None: all that were rated.
            **options: see `RunOptions`, without those of one item and those that ask a person.

        Raises:
            InputError: there is no candidate, or none could be rated for a fault of the input.
            SettingError: a bad `top_k` or option.
            EngineError: none could be rated for another reason.
        """
        end = self.ranking_graph.invoke(**ranking.call(user_id, items, top_k, options))
        return Ranking.from_dict(end.value["ranking"])

    async def arank(
        self, user_id: str, items: Candidates, top_k: int | None = 10, **options: Unpack[RunOptions]
    ) -> Ranking:
        """As `rank`. Waiting holds no thread; cancelling frees the engine."""
        end = await self.ranking_graph.ainvoke(**ranking.call(user_id, items, top_k, options))
        return Ranking.from_dict(end.value["ranking"])

    def stream_rank(
        self, user_id: str, items: Candidates, top_k: int | None = 10, **options: Unpack[RunOptions]
    ) -> Iterator[CandidateProgress | Ranking]:
        """As `rank`, telling of each candidate as it is done; the `Ranking` comes last."""
        return ranking.stream(self.ranking_graph, ranking.call(user_id, items, top_k, options))

    async def astream_rank(
        self, user_id: str, items: Candidates, top_k: int | None = 10, **options: Unpack[RunOptions]
    ) -> AsyncGenerator[CandidateProgress | Ranking]:
        """As `stream_rank`."""
        call = ranking.call(user_id, items, top_k, options)
        async with aclosing(ranking.astream(self.ranking_graph, call)) as events:
            async for event in events:
                yield event

    def as_tool(self) -> list[BaseTool]:
        """LangChain tools for an agent: `rate_item`, `recommend_items`, `explain_user`. See
        `r4r_graph.tools.recommender_tools` for their settings."""
        from r4r_graph.tools import recommender_tools

        return recommender_tools(self)

    def close(self) -> None:
        """Stop the engine and free its model."""
        self.experts.close()
        if self._opened is not None:
            self._opened.conn.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _kept_as(
    thread_id: str, labels: Mapping[str, Any], config: RunnableConfig | None
) -> RunnableConfig:
    """The caller's settings of a run, with its thread and its labels."""
    config = config or {}
    return {
        **config,
        "configurable": {**config.get("configurable", {}), "thread_id": thread_id},
        "metadata": {**labels, **config.get("metadata", {})},
    }


def _run_input(user_id: str, item_id: str, settings: dict[str, Any]) -> RatingInput:
    """The graph's input; takes what belongs to it out of `settings`."""
    as_of, item = settings.pop("as_of", None), settings.pop("item", None)
    given = RatingInput(
        user_id=checked_id(user_id, "user_id"),
        item_id=checked_id(item_id, "item_id"),
        as_of=None if as_of is None else unix_seconds(as_of, what="as_of"),
        item=None if item is None else plain_item(item),
    )
    for side in ("user_history", "item_history"):
        given[side] = plain_history(settings.pop(side, None))
    return given
