"""The whole wiring of the rating graph, on one screen.

START -> recall -> summarizer (one Send a review) -> reasoner -> predictor -> END
             \\--> reasoner, when there is nothing to summarize
predictor -> reasoner, for the next round of rationales while unsure
reasoner -> human -> predictor, when asked to show the rationale first (or back, when refused)
predictor -> human -> END, when the rating is less sure than asked
predictor or human -> influence -> END, when asked what moved the rating
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from langchain_core.runnables import RunnableLambda
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.store.base import BaseStore
from langgraph.types import Checkpointer, RetryPolicy

from r4r_graph.errors import is_retryable
from r4r_graph.experts import Experts
from r4r_graph.graph.limits import alimited, limited
from r4r_graph.graph.nodes import Nodes
from r4r_graph.graph.state import Knobs, RatingInput, RatingState, SummarizerTask
from r4r_graph.reviews import ReviewSource

RatingGraph = CompiledStateGraph[RatingState, Knobs, RatingInput, RatingState]

MAX_CONCURRENCY = 64
"""Steps of one run at the same time: wide enough for a fan-out over two long histories."""


def build_graph(
    experts: Experts,
    reviews: ReviewSource | None = None,
    *,
    checkpointer: Checkpointer = None,
    store: BaseStore | None = None,
    name: str = "r4r",
) -> RatingGraph:
    """The compiled rating graph.

    Args:
        experts: the three experts.
        reviews: where histories come from; None where every run brings its own.
        checkpointer: any LangGraph saver; keeps runs by thread id.
        store: any LangGraph store; summaries are then kept there instead of `experts.store`.
        name: the graph's name, as a parent graph shows it.

    Its input is `RatingInput`, its context `Knobs`, its result `state["recommendation"]`
    (`Recommendation.to_dict()`). `invoke`, `ainvoke` and all stream modes work.
    """
    if store is not None:
        experts = replace(experts, store=store)
    nodes = Nodes(experts, reviews)
    retry = RetryPolicy(max_attempts=3, retry_on=is_retryable)
    card: dict[str, Any] = experts.model_card()

    def step(name: str, work: Any, awork: Any) -> RunnableLambda[Any, Any]:
        """A step that waits for the engine, no longer than the run may take."""
        return RunnableLambda(limited(name, work), afunc=alimited(name, awork))

    def shown(expert: str) -> dict[str, Any]:
        """What the drawing says of an expert's node."""
        adapter = card["adapters"][expert] or "none (base model)"
        return {"adapter": adapter, "prompt": card["prompts"][expert]}

    builder = StateGraph(RatingState, Knobs, input_schema=RatingInput)
    builder.add_node("recall", nodes.recall, retry_policy=retry)
    builder.add_node(
        "summarizer",
        step("summarizer", nodes.summarize, nodes.asummarize),
        input_schema=SummarizerTask,
        metadata=shown("summarizer"),
        retry_policy=retry,
    )
    builder.add_node(
        "reasoner",
        step("reasoner", nodes.reason, nodes.areason),
        metadata=shown("reasoner"),
        retry_policy=retry,
    )
    builder.add_node(
        "predictor",
        step("predictor", nodes.predict, nodes.apredict),
        metadata=shown("predictor"),
        retry_policy=retry,
    )
    builder.add_node("human", nodes.human)
    builder.add_node(
        "influence",
        step("influence", nodes.influence, nodes.ainfluence),
        metadata=shown("predictor"),
        retry_policy=retry,
    )
    builder.add_edge(START, "recall")
    builder.add_conditional_edges("recall", nodes.after_recall, ["summarizer", "reasoner"])
    builder.add_edge("summarizer", "reasoner")
    builder.add_conditional_edges("reasoner", nodes.after_reasoner, ["human", "predictor"])
    builder.add_conditional_edges(
        "human", nodes.after_human, ["reasoner", "predictor", "influence", END]
    )
    builder.add_conditional_edges(
        "predictor", nodes.after_predictor, ["reasoner", "human", "influence", END]
    )
    builder.add_edge("influence", END)
    graph = builder.compile(checkpointer=checkpointer, store=store, name=name)
    # Two steps a round of rationales, 256 rationales at most.
    return graph.with_config(recursion_limit=600, max_concurrency=MAX_CONCURRENCY)
