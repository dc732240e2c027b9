"""A person in the loop: what is asked, what each answer does, and that asking costs nothing."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command
from typing_extensions import TypedDict

from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.errors import InputError, RunPausedError, SettingError
from r4r_graph.events import Question, RationaleToken
from r4r_graph.graph import human
from r4r_graph.ratings import RatingScale
from r4r_graph.recommender import Recommender
from r4r_graph.runs import open_runs, thread
from r4r_graph.schema import Recommendation
from tests.scripted import Bench, Script, at, make_bench, review

Fake = Callable[..., BatchingEngine]

TABLE = [
    review("ann", "folk", 1, 5),
    review("ann", "rock", 2, 1),
    review("ben", "target", 1, 2),
]
PAIR: Any = {"user_id": "ann", "item_id": "target", "as_of": at(9)}
SURE, UNSURE = [0.0, 0.0, 0.0, 0.05, 0.95], [0.1, 0.1, 0.4, 0.2, 0.2]


def bench(fake: Fake, weights: list[float] = SURE, rows: Any = TABLE, **settings: Any) -> Bench:
    script = Script(weights=lambda _: weights)
    return make_bench(fake, rows, script=script, checkpointer=InMemorySaver(), **settings)


def begin(made: Bench, **knobs: Any) -> Any:
    """The question that a run waits with."""
    return asked(made.graph.invoke(PAIR, thread("1"), context=knobs, version="v2"))  # type: ignore[call-overload]


def answer(made: Bench, value: Any) -> Any:
    """What the run answers to an answer: its next question, or its state."""
    ended = made.graph.invoke(Command(resume=value), thread("1"), version="v2")
    return asked(ended) if ended.interrupts else ended.value


def asked(ended: Any) -> Any:
    [interrupt] = ended.interrupts
    return interrupt.value


# Before the predictor --------------------------------------------------------------------------


def test_the_rationale_is_shown_before_it_is_rated_with(fake: Fake) -> None:
    made = bench(fake)
    assert begin(made, ask=True) == {
        "about": "rationale",
        "answers": ["accept", "edit", "refuse"],
        "user_id": "ann",
        "item_id": "target",
        "title": "Target",
        "rationales": ["Reason 0."],
    }
    assert made.script.ratings == []
    state = answer(made, "accept")
    assert state["answers"] == [{"about": "rationale", "action": "accept"}]
    assert state["recommendation"]["rationale"] == "Reason 0."
    assert state["recommendation"]["answers"] == state["answers"]
    assert len(made.script.rationales) == len(made.script.ratings) == 1


def test_asking_makes_no_call_of_the_engine(fake: Fake) -> None:
    made = bench(fake)
    begin(made, ask=True, ask_below=1.0)
    before = len(made.script.asked)
    for _ in range(3):  # each resumption begins the step again
        assert "fault" in answer(made, "what?")
    assert len(made.script.asked) == before
    assert made.graph.get_state(thread("1")).next == ("human",)


def test_an_edited_rationale_is_rated_with(fake: Fake) -> None:
    made = bench(fake)
    begin(made, ask=True)
    state = answer(made, {"action": "edit", "rationale": "  They hate folk. "})
    assert state["rationales"] == [{"text": "They hate folk.", "seed": 0, "edited": True}]
    [request] = made.script.ratings
    assert "They hate folk." in request.messages[2].content
    assert "Reason" not in request.messages[2].content
    found = Recommendation.from_dict(state["recommendation"])
    assert found.rationale == "They hate folk."
    assert found.answers[0]["rationales"] == ["They hate folk."]


def test_several_rationales_are_edited_one_by_one(fake: Fake) -> None:
    made = bench(fake)
    begin(made, ask=True, rationales=2)
    for wrong in (["only one"], ["one", " "], ["one", 2], "one"):
        question = answer(made, {"action": "edit", "rationales": wrong})
        assert question["fault"] == "an edit holds 2 rationales, none of them blank"
        assert question["rationales"] == ["Reason 0.", "Reason 1."]
    state = answer(made, {"action": "edit", "rationales": ["First.", "Second."]})
    assert state["recommendation"]["rationales"] == ["First.", "Second."]
    assert len(made.script.ratings) == 2


def test_a_refused_rationale_is_replaced_by_another(fake: Fake) -> None:
    made = bench(fake)
    begin(made, ask=True, seed=3)
    texts = []
    for _ in range(3):
        texts += answer(made, "refuse")["rationales"]
    requests = made.script.rationales
    assert [request.temperature for request in requests] == [0.0, 0.8, 0.8, 0.8]
    assert len({request.seed for request in requests}) == 4
    assert len(set(texts)) == 3
    state = answer(made, "accept")
    assert state["recommendation"]["rationale"] == texts[-1]
    assert [drawn["text"] for drawn in state["rationales"]] == texts[-1:]
    assert [one["action"] for one in state["answers"]] == ["refuse"] * 3 + ["accept"]
    assert len(made.script.ratings) == 1


def test_refusing_is_not_told_twice_of_what_was_cut(fake: Fake) -> None:
    from r4r_graph.evidence import TokenBudgets

    many = [*TABLE, *(review("ann", f"more{n}", 3 + n) for n in range(5))]
    made = bench(fake, rows=many, budgets=TokenBudgets(side=32))
    begin(made, ask=True)
    answer(made, "refuse")
    state = answer(made, "accept")
    cuts = [cut["what"] for cut in state["truncated"]]
    assert cuts.count("user_history") == 1


def test_every_round_of_rationales_is_asked_about(fake: Fake) -> None:
    made = bench(fake, UNSURE)
    question = begin(made, ask=True, rationales=5, round_size=2)
    assert question["rationales"] == ["Reason 0.", "Reason 1."]
    question = answer(made, "accept")
    assert question["rationales"] == ["Reason 2.", "Reason 3."]
    question = answer(made, "refuse")
    assert question["rationales"] == ["Reason 4.", "Reason 5."]
    question = answer(made, {"action": "edit", "rationales": ["Mine.", "Ours."]})
    assert question["rationales"] == ["Reason 6."]
    state = answer(made, "accept")
    texts = ["Reason 0.", "Reason 1.", "Mine.", "Ours.", "Reason 6."]
    assert state["recommendation"]["rationales"] == texts
    assert len(state["distributions"]) == 5
    assert len(made.script.ratings) == 5


# After the predictor ---------------------------------------------------------------------------


def test_an_unsure_rating_is_shown(fake: Fake) -> None:
    made = bench(fake, UNSURE)
    question = begin(made, ask_below=0.5)
    assert (question["about"], question["answers"]) == ("rating", ["accept", "rate"])
    assert question["rating"] == pytest.approx(3.3)
    assert question["confidence"] == pytest.approx(0.4)
    assert question["distribution"]["3"] == pytest.approx(0.4)
    assert question["rationales"] == ["Reason 0."]
    state = answer(made, "accept")
    assert state["recommendation"]["rating"] == pytest.approx(3.3)
    assert state["recommendation"]["answers"] == [{"about": "rating", "action": "accept"}]


def test_a_sure_rating_is_not(fake: Fake) -> None:
    made = bench(fake, UNSURE)
    ended: Any = made.graph.invoke(PAIR, thread("1"), context={"ask_below": 0.4}, version="v2")  # type: ignore[call-overload]
    assert ended.interrupts == ()  # 0.4 is not below 0.4
    assert ended.value["answers"] == []


def test_a_persons_rating_stands_beside_the_distribution(fake: Fake) -> None:
    made = bench(fake, UNSURE)
    begin(made, ask_below=1.0)
    state = answer(made, {"action": "rate", "rating": 1.5})
    row = state["recommendation"]
    assert (row["rating"], row["mean"]) == (1.5, pytest.approx(3.3))
    assert row["answers"] == [{"about": "rating", "action": "rate", "rating": 1.5}]
    found = Recommendation.from_dict(row)
    assert (found.rating, found.to_dict()) == (1.5, row)


def test_it_is_asked_once_all_rounds_are_over(fake: Fake) -> None:
    made = bench(fake, UNSURE)
    question = begin(made, ask_below=0.9, rationales=4, round_size=2)
    assert len(question["rationales"]) == 4


# Answers that are none -------------------------------------------------------------------------

SCALE = RatingScale()
ABOUT_RATIONALE = {"about": "rationale", "answers": ["accept", "edit", "refuse"], "rationales": "x"}
ABOUT_RATING = {"about": "rating", "answers": ["accept", "rate"], "rationales": ["x"]}


@pytest.mark.parametrize(
    ("question", "value", "said"),
    [
        (ABOUT_RATIONALE, "maybe", "action 'maybe' is none of accept, edit, refuse"),
        (ABOUT_RATIONALE, {}, "action None is none of"),
        (ABOUT_RATIONALE, ["accept"], "action None is none of"),
        (ABOUT_RATIONALE, 3, "action None is none of"),
        (ABOUT_RATIONALE, {"action": ["edit"]}, r"action \['edit'\] is none of"),
        (ABOUT_RATIONALE, "rate", "action 'rate' is none of"),
        (ABOUT_RATIONALE, "edit", "an edit holds a rationale, none of them blank"),
        (ABOUT_RATIONALE, {"action": "edit", "rationale": " "}, "none of them blank"),
        (ABOUT_RATIONALE, {"action": "edit", "rationale": 5}, "none of them blank"),
        (ABOUT_RATIONALE, {"action": "edit", "rationales": {"0": "x"}}, "none of them blank"),
        (ABOUT_RATING, "refuse", "action 'refuse' is none of accept, rate"),
        (ABOUT_RATING, "rate", "rating None is no number from 1 to 5"),
        (ABOUT_RATING, {"action": "rate", "rating": "4"}, "rating '4' is no number"),
        (ABOUT_RATING, {"action": "rate", "rating": True}, "rating True is no number"),
        (ABOUT_RATING, {"action": "rate", "rating": 0.9}, "rating 0.9 is no number"),
        (ABOUT_RATING, {"action": "rate", "rating": 10**400}, "is no number from 1 to 5"),
        (ABOUT_RATING, {"action": "rate", "rating": float("nan")}, "rating nan is no number"),
    ],
)
def test_what_is_no_answer_is_said_in_words(question: Any, value: Any, said: str) -> None:
    import re

    wrong = human.fault(human.plain_answer(value), question, SCALE)
    assert wrong is not None
    assert re.search(said, wrong)


def test_a_rating_of_zero_is_one_where_the_scale_has_it() -> None:
    scale = RatingScale((-1.0, 0.0, 1.0))
    given = {"action": "rate", "rating": 0}
    assert human.fault(given, ABOUT_RATING, scale) is None
    assert human.decided(given, ABOUT_RATING)["rating"] == 0


def test_it_is_asked_again_with_the_fault(fake: Fake) -> None:
    made = bench(fake, UNSURE)
    begin(made, ask_below=1.0)
    for value in ("refuse", {"action": "rate", "rating": 9}, None, {"action": "rate"}):
        assert answer(made, value if value is not None else 0)["fault"]
        [waiting] = made.graph.get_state(thread("1")).interrupts
        assert "fault" in waiting.value
    assert answer(made, "accept")["recommendation"]["rating"] == pytest.approx(3.3)


# The facade ------------------------------------------------------------------------------------


def load(fake: Fake, saver: Any, **script: Any) -> Recommender:
    from langgraph.store.memory import InMemoryStore

    made = Script(**script)
    engine = fake(write=made.write, rate=made.rate)
    return Recommender.load(TABLE, engine=engine, store=InMemoryStore(), checkpointer=saver)


def test_a_pause_is_an_error_that_says_how_to_go_on(fake: Fake) -> None:
    rater = load(fake, InMemorySaver())
    with pytest.raises(RunPausedError, match="run mon waits for a person's answer about") as caught:
        rater.rate("ann", "target", ask=True, config=thread("mon"))
    assert caught.value.thread_id == "mon"
    assert caught.value.question["rationales"] == ["Reason 0."]
    assert rater.resume("mon", "accept").rationale == "Reason 0."


def test_a_pause_without_a_thread_names_the_one_it_got(fake: Fake) -> None:
    rater = load(fake, InMemorySaver())
    with pytest.raises(RunPausedError) as caught:
        rater.rate("ann", "target", ask=True)
    assert rater.resume(caught.value.thread_id, "accept").rationale == "Reason 0."


def test_nobody_is_asked_where_nothing_is_kept(fake: Fake) -> None:
    for saver in (None, False):
        rater = load(fake, saver)
        for knobs in ({"ask": True}, {"ask_below": 0.5}):
            with pytest.raises(SettingError, match="has to be kept while it waits"):
                rater.rate("ann", "target", **knobs)  # type: ignore[arg-type]
        with pytest.raises(SettingError, match="keeps no runs"):
            rater.resume("mon", "accept")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "no answer was given; it takes accept, edit, refuse"),
        ("maybe", "action 'maybe'"),
        ({"action": "edit", "rationale": ""}, "none of them blank"),
    ],
)
def test_a_wrong_answer_is_refused_and_nothing_changes(fake: Fake, value: Any, said: str) -> None:
    rater = load(fake, InMemorySaver())
    with pytest.raises(RunPausedError):
        rater.rate("ann", "target", ask=True, config=thread("mon"))
    with pytest.raises(InputError, match=said):
        rater.resume("mon", value)
    with pytest.raises(InputError, match=said):
        rater.stream_resumed("mon", value)
    with pytest.raises(InputError, match=said):
        asyncio.run(rater.aresume("mon", value))
    [waiting] = rater.graph.get_state(thread("mon")).interrupts
    assert "fault" not in waiting.value
    assert rater.resume("mon", "accept").rationale == "Reason 0."


@pytest.mark.parametrize("world", ["sync", "async"])
def test_streams_end_with_the_question(fake: Fake, world: str) -> None:
    rater = load(fake, InMemorySaver(), weights=lambda _: UNSURE)

    async def collect(events: Any) -> list[Any]:
        return [event async for event in events]

    def begun() -> list[Any]:
        options: Any = {"ask": True, "ask_below": 0.9, "config": thread("mon")}
        if world == "sync":
            return list(rater.stream("ann", "target", **options))
        return asyncio.run(collect(rater.astream("ann", "target", **options)))

    def resumed(value: Any) -> list[Any]:
        if world == "sync":
            return list(rater.stream_resumed("mon", value))
        return asyncio.run(collect(rater.astream_resumed("mon", value)))

    events = begun()
    assert isinstance(events[-1], Question)
    assert (events[-1].thread_id, events[-1].asked["about"]) == ("mon", "rationale")
    again = resumed("refuse")
    tokens = [event for event in again if isinstance(event, RationaleToken)]
    assert "".join(token.text for token in tokens) == "Reason 1."
    assert {token.rationale for token in tokens} == {0}  # in the place of the refused one
    assert isinstance(again[-1], Question)
    [rating] = resumed("accept")
    assert rating.asked["about"] == "rating"
    [found] = resumed({"action": "rate", "rating": 2})
    assert (found.rating, found.rationale) == (2, "Reason 1.")


def test_the_callers_settings_reach_a_resumed_run(fake: Fake) -> None:
    from langchain_core.callbacks import BaseCallbackHandler

    seen: list[str] = []

    class Listener(BaseCallbackHandler):
        def on_chat_model_start(self, *_: Any, **about: Any) -> None:
            seen.extend(about["tags"])

    rater = load(fake, InMemorySaver())
    with pytest.raises(RunPausedError):
        rater.rate("ann", "target", ask=True, config=thread("mon"))
    config: Any = {"callbacks": [Listener()], "tags": ["second"], "configurable": {"x": 1}}
    with pytest.raises(RunPausedError):
        rater.resume("mon", "refuse", config=config)
    assert "second" in seen


# Elsewhere -------------------------------------------------------------------------------------

RESUME = """
    import sys
    from pathlib import Path
    from r4r_graph import Recommender, fake_engine
    from r4r_graph.runs import open_runs

    with open_runs(Path(sys.argv[1])) as kept, fake_engine() as engine:
        rater = Recommender.load(engine=engine, checkpointer=kept)
        print(rater.resume("mon", {"action": "edit", "rationale": "Written elsewhere."}).rationale)
"""


def test_it_is_answered_in_another_process(fake: Fake, tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"
    with open_runs(path) as kept, pytest.raises(RunPausedError):
        load(fake, kept).rate("ann", "target", ask=True, config=thread("mon"))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(RESUME), path],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "Written elsewhere.\n")
    with open_runs(path) as kept:
        state = load(fake, kept).graph.get_state(thread("mon"))
    assert state.values["recommendation"]["rationale"] == "Written elsewhere."


def test_an_asynchronous_saver_keeps_and_resumes(fake: Fake, tmp_path: Path) -> None:
    from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

    from r4r_graph.runs import history, list_runs

    async def everything() -> tuple[Recommendation, Recommendation, list[Any]]:
        async with AsyncSqliteSaver.from_conn_string(str(tmp_path / "runs.sqlite")) as saver:
            rater = load(fake, saver, weights=lambda _: UNSURE)
            with pytest.raises(RunPausedError):
                await rater.arate("ann", "target", ask=True, config=thread("mon"))
            with pytest.raises(RunPausedError):
                await rater.aresume("mon", "refuse")
            found = await rater.aresume("mon", "accept")
            fork = await rater.afork("mon", {"rationale": "Mine."})
            forked = await rater.aresume(fork)
            listed = await asyncio.to_thread(list_runs, rater.graph)
            states = await asyncio.to_thread(history, rater.graph, "mon")
            assert states[-1].values["recommendation"] == found.to_dict()
            return found, forked, listed

    found, forked, listed = asyncio.run(everything())
    assert (found.rationale, forked.rationale) == ("Reason 1.", "Mine.")
    assert [run.forked_from for run in listed] == ["mon", None]


class Trip(TypedDict, total=False):
    user_id: str
    item_id: str
    as_of: Any
    recommendation: dict[str, Any]
    told: str


@pytest.mark.parametrize("world", ["sync", "async"])
def test_it_asks_through_a_parent_graph(fake: Fake, world: str) -> None:
    made = make_bench(fake, TABLE)
    builder = StateGraph(Trip, context_schema=dict[str, Any])
    builder.add_node("rating", made.graph)
    builder.add_node("tell", lambda state: {"told": f"{state['recommendation']['rating']}"})
    builder.add_edge(START, "rating")
    builder.add_edge("rating", "tell")
    graph: Any = builder.compile(checkpointer=InMemorySaver())

    def call(value: Any) -> Any:
        from r4r_graph.graph import Knobs

        options: Any = {"context": Knobs(ask=True), "version": "v2"}
        if world == "sync":
            return graph.invoke(value, thread("1"), **options)
        return asyncio.run(graph.ainvoke(value, thread("1"), **options))

    ended = call(PAIR)
    assert asked(ended)["rationales"] == ["Reason 0."]
    assert asked(call(Command(resume="refuse")))["rationales"] == ["Reason 1."]
    assert call(Command(resume="accept")).value["told"] == "3.0"
    assert len(made.script.summaries) == 3  # nothing was done twice
    assert len(made.script.rationales) == 2
