"""The ranking graph: candidates fan out over the rating graph, and come back best first.

START -> candidates -> rating (one Send a candidate; the rating graph inside) -> ranking -> END

State is plain JSON, as the rating graph's. A candidate that fails leaves its reason, and the others
go on. With a checkpointer a run that was killed goes on with `graph.invoke(None, config)`: what is
rated is kept, and what was begun continues inside its rating graph.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import replace
from datetime import datetime
from typing import Annotated, Any, cast

from langchain_core.runnables import RunnableConfig, RunnableLambda
from langgraph.channels import EphemeralValue
from langgraph.config import get_config
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.store.base import BaseStore
from langgraph.types import Checkpointer, Overwrite, Send
from typing_extensions import TypedDict

from r4r_graph.errors import InputError, R4RError, RequestError, RunTimeoutError, SettingError
from r4r_graph.events import read_by_task
from r4r_graph.experts import Experts
from r4r_graph.graph.build import build_graph
from r4r_graph.graph.limits import starting_now
from r4r_graph.graph.recall import plain_history, plain_item
from r4r_graph.graph.state import Json, Knobs, RatingInput, check_knobs, knobs, merge
from r4r_graph.ranking import (
    CandidateProgress,
    Failure,
    Ranking,
    RankingEvents,
    check_count,
    outcome_of,
    ranked,
)
from r4r_graph.reviews import ReviewSource
from r4r_graph.schema import Item, Review, plain_number, unix_seconds

MAX_CONCURRENCY = 32
"""Candidates rated at the same time: as many as the engine takes in one batch."""


class RankingInput(TypedDict, total=False):
    """What a run is given."""

    user_id: str
    items: Annotated[list[str | Json], EphemeralValue]
    """The candidates: ids, or `Item.to_dict()`s where the review source does not know them. One
    that comes again is rated once, in its first place."""
    top_k: Annotated[int | None, EphemeralValue]
    """How many to return; None: all that were rated."""
    as_of: Annotated[float | str | None, EphemeralValue]
    """For all candidates; see `RatingInput`."""
    user_history: Annotated[list[Json] | None, EphemeralValue]
    """See `RatingInput`."""


class RankingState(RankingInput, total=False):
    """What a run found out."""

    plan: Json
    """What is ranked: user_id, as_of, top_k, user_history, `candidates` (`Item.to_dict()`s), and
    how many of them are rated at the same moment (`siblings`)."""
    outcomes: Annotated[dict[str, Json], merge]
    """Item id to `Recommendation.to_dict()`, or to `Failure.to_dict()`."""
    ranking: Json
    """`Ranking.to_dict()`."""


class CandidateTask(TypedDict):
    """What one `Send` to the rating carries."""

    item: Json
    plan: Json
    """That of the state, without the candidates."""


Candidates = Iterable[str | Item]
"""Ids of items, or items."""

RankingGraph = CompiledStateGraph[RankingState, Knobs, RankingInput, RankingState]


def build_ranking_graph(
    experts: Experts,
    reviews: ReviewSource | None = None,
    *,
    checkpointer: Checkpointer = None,
    store: BaseStore | None = None,
    keep_going: bool = True,
    name: str = "r4r-ranking",
) -> RankingGraph:
    """The compiled ranking graph.

    Args:
        experts: the three experts.
        reviews: where histories come from.
        checkpointer: any LangGraph saver; keeps runs by thread id.
        store: as in `build_graph`.
        keep_going: whether a candidate for which the engine fails (a full queue, a server that is
            away) is one more that failed. If not, such an error ends the run: with a checkpointer,
            it goes on from there when the engine is well again.
        name: the graph's name, as a parent graph shows it.

    Its input is `RankingInput`, its context `Knobs` (of every rating), its result
    `state["ranking"]` (`Ranking.to_dict()`). At most `max_concurrency` candidates are rated at the
    same time (32, if the run's config does not say).

    A run raises InputError without candidates or where none could be rated for a fault of the
    input, SettingError for a bad `top_k`, EngineError where none could be rated for another reason,
    RunTimeoutError where none was in the time that the run may take.
    """
    # False: inside somebody else's graph, the ratings leave nothing in their checkpoints either.
    inherited = False if checkpointer is False else None
    rating = build_graph(experts, reviews, checkpointer=inherited, store=store)
    # An unknown item, one that is too long: as wrong when it is tried again.
    failing = (R4RError,) if keep_going else (InputError, RequestError)

    def rate(task: CandidateTask) -> Json:
        """Rate one candidate."""
        try:
            end = rating.invoke(_to_rate(task, reviews), context=knobs())
        except failing as error:
            return _done(task, _failure(task, error))
        return _done(task, end["recommendation"])

    async def arate(task: CandidateTask) -> Json:
        try:
            end = await rating.ainvoke(_to_rate(task, reviews), context=knobs())
        except failing as error:
            return _done(task, _failure(task, error))
        return _done(task, end["recommendation"])

    builder = StateGraph(RankingState, Knobs, input_schema=RankingInput)
    builder.add_node("candidates", _plan)
    builder.add_node("rating", RunnableLambda(rate, afunc=arate), input_schema=CandidateTask)
    builder.add_node("ranking", _ranking)
    builder.add_edge(START, "candidates")
    builder.add_conditional_edges("candidates", _fan_out, ["rating"])
    builder.add_edge("rating", "ranking")
    builder.add_edge("ranking", END)
    graph = builder.compile(checkpointer=checkpointer, store=store, name=name)
    # The limit of steps is the rating graph's, which inherits this one.
    limit = (rating.config or {})["recursion_limit"]
    return graph.with_config(recursion_limit=limit, max_concurrency=MAX_CONCURRENCY)


def _plan(state: RankingState) -> Json:
    """Settle what is ranked, and forget what an earlier run on this thread found."""
    user_id, given, top_k = state.get("user_id"), state.get("items"), state.get("top_k")
    if not isinstance(user_id, str) or not user_id:
        raise InputError(f"bad user_id {user_id!r}: must be a text that is not empty")
    if top_k is not None:
        check_count("top_k", top_k)
    candidates: dict[str, Item] = {}
    for place, each in enumerate(given or (), start=1):
        item = _candidate(each, place)
        candidates.setdefault(item.item_id, item)
    if not candidates:
        raise InputError("nothing to rank: pass at least one candidate")
    as_of, at_once = state.get("as_of"), get_config().get("max_concurrency") or MAX_CONCURRENCY
    before = time.time() if as_of is None else unix_seconds(as_of, what="as_of")
    plan = {
        "user_id": user_id,
        "as_of": plain_number(before),
        "top_k": top_k,
        "user_history": state.get("user_history"),
        "candidates": [item.to_dict() for item in candidates.values()],
        "siblings": min(len(candidates), at_once),
    }
    return {"plan": plan, "outcomes": Overwrite({}), "ranking": {}}


def _candidate(given: Any, place: int) -> Item:
    if isinstance(given, str):
        item = Item(given)
    elif isinstance(given, Mapping):
        item = Item.from_dict(given)
    else:
        raise InputError(f"candidate {place} is {given!r}: must be an item's id, or an item")
    if not item.item_id:
        raise InputError(f"candidate {place} has an empty item_id")
    return item


def _fan_out(state: RankingState) -> list[Send]:
    plan = dict(state["plan"])
    candidates = plan.pop("candidates")
    return [Send("rating", CandidateTask(item=item, plan=plan)) for item in candidates]


def _to_rate(task: CandidateTask, reviews: ReviewSource | None) -> RatingInput:
    """The rating graph's input.

    Raises:
        InputError: nothing at all is known of the item. Rated all the same, it would stand in the
            ranking by the user's average alone.
    """
    item, plan = task["item"], task["plan"]
    described = replace(Item.from_dict(item), item_id="") != Item("")
    if reviews is not None and not described and not reviews.knows_item(item["item_id"]):
        raise InputError(
            f"item {item['item_id']!r} appears nowhere in the reviews or items; check the id, or "
            "pass an Item with a title"
        )
    return RatingInput(
        user_id=plan["user_id"],
        item_id=item["item_id"],
        as_of=plan["as_of"],
        item=item if described else None,
        user_history=plan["user_history"],
        siblings=plan["siblings"],
    )


def _failure(task: CandidateTask, error: R4RError) -> Json:
    return Failure(task["item"]["item_id"], type(error).__name__, str(error)).to_dict()


def _done(task: CandidateTask, outcome: Json) -> Json:
    return {"outcomes": {task["item"]["item_id"]: outcome}}


def _ranking(state: RankingState) -> Json:
    plan, outcomes = state["plan"], state["outcomes"]
    late, limit = RunTimeoutError.__name__, knobs().timeout
    if limit is not None and all(each.get("error") == late for each in outcomes.values()):
        raise RunTimeoutError(limit, "rating")
    in_order = [outcome_of(outcomes[item["item_id"]]) for item in plan["candidates"]]
    found = ranked(plan["user_id"], plan["as_of"], in_order, plan["top_k"])
    return {"ranking": found.to_dict()}


# How it is called --------------------------------------------------------------------------------


def call(
    user_id: str, items: Candidates, top_k: int | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What a ranking graph is called with (`graph.invoke(**call(...))`).

    Args:
        user_id: for whom.
        items: the candidates.
        top_k: how many to return; None: all.
        options: as_of, user_history, config, and the fields of `Knobs`.

    Raises:
        InputError: the candidates are one text.
        SettingError: an option that is no ranking's, or a knob that is out of range or asks a
            person.
    """
    if isinstance(items, str):
        raise InputError(f"bad candidates {items!r}: pass a list of ids, or of items")
    settings = dict(options)
    as_of: float | str | datetime | None = settings.pop("as_of", None)
    history: Iterable[Review] | None = settings.pop("user_history", None)
    config: RunnableConfig | None = settings.pop("config", None)
    for name in ("item", "item_history"):
        if settings.pop(name, None) is not None:
            raise SettingError(f"{name} is of one item: pass Items as candidates")
    context = check_knobs(settings)
    if context.ask or context.ask_below:
        raise SettingError("a ranking can ask nobody: leave out ask and ask_below")
    given = RankingInput(
        user_id=user_id,
        items=[plain_item(each) if isinstance(each, Item) else cast(Any, each) for each in items],
        top_k=top_k,
        as_of=None if as_of is None else unix_seconds(as_of, what="as_of"),
        user_history=plain_history(history),
    )
    config = starting_now(config, context.timeout)
    return {"input": given, "config": config, "context": context, "version": "v2"}


def stream(
    graph: RankingGraph, called_with: Mapping[str, Any]
) -> Iterator[CandidateProgress | Ranking]:
    """Each candidate as it is done, and the ranking last.

    Args:
        graph: see `build_ranking_graph`.
        called_with: see `call`.
    """
    events = RankingEvents()
    # Not the custom mode: in it, LangGraph waits on a thread of its own that `max_concurrency`
    # counts, and a concurrency of one would stand still.
    for part in graph.stream(**called_with, stream_mode="updates"):
        yield from events.of(part)
    yield events.last()


async def astream(
    graph: RankingGraph, called_with: Mapping[str, Any]
) -> AsyncGenerator[CandidateProgress | Ranking]:
    """As `stream`."""
    events = RankingEvents()
    running = graph.astream(**called_with, stream_mode="updates")
    async with aclosing(read_by_task(running)) as parts:
        async for part in parts:
            for event in events.of(part):
                yield event
    yield events.last()
