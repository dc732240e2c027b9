"""The rating graph inside a graph of your own, with your own state.

    python examples/subgraph.py             the fake engine, and a person who accepts everything

A shop's graph gets a visitor and what is on the shelf, rates each thing with the rating graph, and
writes a letter. Its state has none of the rating graph's keys: the node `rate` translates. What
the rating graph streams (tokens, steps) comes out of the shop's own stream, and its questions to a
person are interrupts of the shop's own run, which any of its threads is resumed with.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from langchain_core.runnables import RunnableLambda
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.store.memory import InMemoryStore
from langgraph.types import Checkpointer, Command, Send
from typing_extensions import TypedDict

import r4r_graph
from r4r_graph import (
    Experts,
    Knobs,
    Recommendation,
    build_graph,
    fake_engine,
    load_items,
    load_reviews,
)
from r4r_graph.graph import RatingGraph, RatingInput

SAMPLE = Path(r4r_graph.__file__).parent / "_demo"


class Shop(TypedDict, total=False):
    """The shop's own state."""

    visitor: str
    shelf: list[str]
    offers: Annotated[list[dict[str, Any]], operator.add]
    letter: str


class Shelved(TypedDict):
    """One thing for one visitor."""

    visitor: str
    thing: str


def shop_graph(
    rating: RatingGraph, knobs: Knobs, checkpointer: Checkpointer = None
) -> CompiledStateGraph[Shop, None, Shop, Shop]:
    """The shop's graph around a rating graph, which has no checkpointer of its own."""

    def each(state: Shop) -> list[Send]:
        things = [Shelved(visitor=state["visitor"], thing=thing) for thing in state["shelf"]]
        return [Send("rate", thing) for thing in things]

    def to_rating(given: Shelved) -> RatingInput:
        return {"user_id": given["visitor"], "item_id": given["thing"]}

    def to_offer(state: dict[str, Any]) -> dict[str, Any]:
        found = Recommendation.from_dict(state["recommendation"])
        return {"offers": [{"thing": found.title, "stars": found.rating, "why": found.rationale}]}

    def rate(given: Shelved) -> dict[str, Any]:
        return to_offer(rating.invoke(to_rating(given), context=knobs))

    async def arate(given: Shelved) -> dict[str, Any]:
        return to_offer(await rating.ainvoke(to_rating(given), context=knobs))

    def write(state: Shop) -> dict[str, Any]:
        best = max(state["offers"], key=lambda offer: offer["stars"])
        return {"letter": f"Dear {state['visitor']}, try {best['thing']}. {best['why']}"}

    builder = StateGraph(Shop)
    builder.add_node("rate", RunnableLambda(rate, afunc=arate), input_schema=Shelved)
    builder.add_node("write", write)
    builder.add_conditional_edges(START, each, ["rate"])
    builder.add_edge("rate", "write")
    builder.add_edge("write", END)
    return builder.compile(checkpointer=checkpointer)


def run(graph: Any, given: Any, config: Any) -> Iterator[str]:
    """What happens on the way, in words; the shop's own stream is all that is read."""
    written: dict[tuple[str, ...], list[str]] = {}  # by rating: several are at work at once
    modes = ["messages", "updates"]
    for part in graph.stream(given, config, stream_mode=modes, subgraphs=True, version="v2"):
        where, told = part["ns"], part["data"]
        if part["type"] == "messages":
            written.setdefault(where, []).append(told[0].text)
        elif where and "reasoner" in told:
            pieces = written.pop(where)
            yield f"  {''.join(pieces)}  ({len(pieces)} pieces)"
        elif not where and "__interrupt__" not in told:
            yield f"[{', '.join(told)}]"


def main() -> None:
    engine = fake_engine()
    reviews = load_reviews(SAMPLE / "reviews.jsonl", items=load_items(SAMPLE / "items.jsonl"))
    rating = build_graph(Experts(engine, InMemoryStore()), reviews)
    graph = shop_graph(rating, Knobs(ask=True), InMemorySaver())
    config: Any = {"configurable": {"thread_id": "visit-1"}}
    given: Any = {"visitor": "mara", "shelf": ["glass-harbour", "small-moths"]}
    while True:
        for said in run(graph, given, config):
            print(said)
        waiting = graph.get_state(config).interrupts
        if not waiting:
            break
        for each in waiting:
            asked = each.value
            print(f"{asked['title']}: {asked['rationales'][0]} -- {' or '.join(asked['answers'])}?")
        given = Command(resume={each.id: "accept" for each in waiting})
    print(graph.get_state(config).values["letter"])
    engine.close()


if __name__ == "__main__":
    main()
