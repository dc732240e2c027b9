"""What a kept run is told to have done, out of its checkpoints alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from r4r_graph.debug.steps import Step
from r4r_graph.debug.trace import trace
from r4r_graph.engine.base import GenerateRequest
from r4r_graph.errors import EngineFailure, RunPausedError, SettingError, UnknownRunError
from r4r_graph.experts import Experts
from r4r_graph.graph import build_graph
from r4r_graph.runs import open_runs, thread
from tests.kept_runs import Fake, load, run, weights
from tests.scripted import Request, Script, mark, prompt, review


def of(steps: tuple[Step, ...], node: str) -> list[Step]:
    return [step for step in steps if step.node == node]


def taken(told: Any) -> dict[str, int]:
    return {f"{e.source}>{e.target}": e.taken for e in told.edges if e.taken}


def fails_on(words: str, error: Exception) -> Script:
    def before(request: Request) -> None:
        if words in prompt(request):
            raise error

    return Script(weights=weights, before=before)


# A run that ended ------------------------------------------------------------------------------


def test_everything_a_run_did(fake: Fake) -> None:
    script = Script(weights=weights)
    recommender = load(fake, script)
    result = run(recommender, "mon", rationales=3, round_size=2, sure=1.0, influence="same")
    told = trace(recommender.graph, "mon")
    assert (told.thread_id, told.status, told.forked_from) == ("mon", "finished", None)
    assert (told.user_id, told.item_id, told.title) == ("ann", "target", "Target")
    assert told.recommendation == result
    assert told.distribution == result.distribution
    assert (told.knobs["rationales"], told.as_of) == (3, result.as_of)
    assert told.model == result.model
    assert told.ended is not None
    assert told.started <= told.ended
    assert " ".join(step.node for step in told.steps) == (
        "recall summarizer summarizer summarizer summarizer reasoner predictor reasoner predictor "
        "influence"
    )
    assert {step.standing for step in told.steps} == {"done"}
    for node, usage in result.usage.items():
        mine = of(told.steps, node)
        assert sum(step.calls for step in mine) == usage.calls
        assert sum(step.prompt_tokens for step in mine) == usage.prompt_tokens
        assert sum(step.completion_tokens for step in mine) == usage.completion_tokens
        (drawn,) = (n for n in told.nodes if n.name == node)
        assert drawn.seconds == pytest.approx(usage.seconds, abs=1e-3)


def test_prompts_are_those_that_the_engine_was_asked(fake: Fake) -> None:
    script = Script(weights=weights)
    recommender = load(fake, script)
    run(recommender, "mon", rationales=2)
    told = trace(recommender.graph, "mon")
    asked = [[(m.role, m.content) for m in request.messages] for request in script.asked]
    shown = [
        [(turn.role, turn.content) for turn in exchange.prompt]
        for step in told.steps
        for exchange in step.exchanges
        for _ in exchange.outputs
    ]
    assert sorted(shown) == sorted(asked)
    (drawing,) = of(told.steps, "reasoner")
    assert [len(exchange.outputs) for exchange in drawing.exchanges] == [2]
    texts = [output.text for output in drawing.exchanges[0].outputs]
    assert texts == [drawn.text for drawn in told.rationales] == ["Reason 0.", "Reason 1."]
    (rating,) = of(told.steps, "predictor")
    shown_p = [exchange.outputs[0].probabilities for exchange in rating.exchanges]
    assert shown_p == [d.distribution.probabilities for d in told.rationales if d.distribution]


def test_each_summary_names_its_review(fake: Fake) -> None:
    recommender = load(fake)
    for name, record in (("mon", True), ("tue", False)):
        run(recommender, name, record=record)
        told = trace(recommender.graph, name)
        named = [step.review for step in of(told.steps, "summarizer")]
        pairs = [(r.user_id, r.item_id) for r in named if r]
        assert pairs == [("ann", "folk"), ("ann", "rock"), ("ben", "target"), ("cy", "target")]
        assert named[0] is not None
        assert named[0].summary.positive == (mark("ann", "folk"),)
        assert named[0].rating == 5
        assert told.recorded is record
    assert [step.cache_hits for step in of(told.steps, "summarizer")] == [1, 1, 1, 1]


def test_reviews_without_words_have_no_step(fake: Fake) -> None:
    reviews = [review("ann", "folk", 1, 5, text=" "), review("ann", "rock", 2, 1)]
    recommender = load(fake, reviews=reviews)
    run(recommender, "mon", item_history=[])
    (step,) = of(trace(recommender.graph, "mon").steps, "summarizer")
    assert step.review is not None
    assert step.review.item_id == "rock"


def test_edges_are_counted_as_they_were_taken(fake: Fake) -> None:
    recommender = load(fake)
    run(recommender, "mon", rationales=2, round_size=1, sure=1.0)
    assert taken(trace(recommender.graph, "mon")) == {
        "__start__>recall": 1,
        "recall>summarizer": 4,
        "summarizer>reasoner": 4,
        "reasoner>predictor": 2,
        "predictor>reasoner": 1,
        "predictor>__end__": 1,
    }
    run(recommender, "tue", user_history=[], item_history=[], influence="same")
    told = trace(recommender.graph, "tue")
    assert taken(told) == {
        "__start__>recall": 1,
        "recall>reasoner": 1,
        "reasoner>predictor": 1,
        "predictor>influence": 1,
        "influence>__end__": 1,
    }
    drawn = {(e.source, e.target, e.conditional) for e in recommender.graph.get_graph().edges}
    assert {(e.source, e.target, e.conditional) for e in told.edges} == drawn
    assert told.cold_start == "both"


def test_steps_stand_in_time(fake: Fake) -> None:
    recommender = load(fake)
    run(recommender, "mon", influence="same")
    told = trace(recommender.graph, "mon")
    assert told.ended is not None
    for step in told.steps:
        assert step.started is not None
        assert step.ended is not None
        assert told.started - 0.1 <= step.started <= step.ended <= told.ended + 0.1


def test_the_trace_is_plain_json(fake: Fake) -> None:
    recommender = load(fake)
    result = run(recommender, "mon", influence="new", rationales=2)
    row = json.loads(json.dumps(trace(recommender.graph, "mon").to_dict(), allow_nan=False))
    assert row["recommendation"] == json.loads(json.dumps(result.to_dict()))
    assert row["steps"][1]["review"]["item_id"] == "folk"
    assert row["steps"][1]["exchanges"][0]["prompt"][0]["role"] == "system"


# Runs that did not end ---------------------------------------------------------------------------


def test_a_failed_run_tells_what_it_failed_at(fake: Fake) -> None:
    script = fails_on(mark("ben", "target"), EngineFailure("out of memory: 'x'"))
    recommender = load(fake, script)
    with pytest.raises(EngineFailure):
        run(recommender, "mon")
    told = trace(recommender.graph, "mon")
    assert (told.status, told.error) == ("failed", "EngineFailure: out of memory: 'x'")
    assert (told.ended, told.recommendation, told.distribution) == (None, None, None)
    (failed,) = (step for step in told.steps if step.standing == "failed")
    assert failed.review is not None
    assert (failed.node, failed.review.user_id) == ("summarizer", "ben")
    assert taken(told) == {"__start__>recall": 1, "recall>summarizer": 4}
    assert [r.item_id for r in told.user_reviews] == ["folk", "rock"]
    (drawn,) = (node for node in told.nodes if node.name == "summarizer")
    assert drawn.standing == "failed"

    script.before = lambda _: None
    recommender.resume("mon")
    told = trace(recommender.graph, "mon")
    assert (told.status, told.error) == ("finished", "")
    assert {step.standing for step in told.steps} == {"done"}


def test_what_siblings_of_a_failed_step_found_is_there(fake: Fake) -> None:
    recommender = load(fake, fails_on("mark_cy", EngineFailure("no")))
    with pytest.raises(EngineFailure):
        run(recommender, "mon", config={**thread("mon"), "max_concurrency": 1})
    told = trace(recommender.graph, "mon")
    done = [step for step in told.steps if step.standing == "done" and step.exchanges]
    assert [step.review.user_id for step in done if step.review] == ["ann", "ann", "ben"]
    assert told.user_reviews[0].summary.positive == (mark("ann", "folk"),)


def test_a_run_that_was_refused(fake: Fake) -> None:
    recommender = load(fake)
    run(recommender, "mon")
    with pytest.raises(LookupError):
        recommender.rate("nobody", "nothing", config=thread("mon"))
    told = trace(recommender.graph, "mon")
    assert (told.user_id, told.status) == ("nobody", "failed")
    assert told.error.startswith("UnknownPairError: user 'nobody' and item 'nothing'")
    assert (told.rationales, told.user_reviews, told.recommendation) == ((), (), None)
    assert [(step.node, step.standing) for step in told.steps] == [("recall", "failed")]


def test_a_run_that_asks_and_is_answered(fake: Fake) -> None:
    recommender = load(fake)
    with pytest.raises(RunPausedError):
        run(recommender, "mon", ask=True, ask_below=1.0)
    told = trace(recommender.graph, "mon")
    assert told.status == "waiting"
    assert told.question is not None
    assert told.question["about"] == "rationale"
    assert [d.distribution for d in told.rationales] == [None]
    assert told.steps[-1] == Step("human", "waiting", told.steps[-1].started, None)
    for answer in ("refuse", {"action": "edit", "rationale": "Mine."}):
        with pytest.raises(RunPausedError):
            recommender.resume("mon", answer)
    told = trace(recommender.graph, "mon")
    assert told.question is not None
    assert told.question["about"] == "rating"
    assert told.recommendation is not None
    recommender.resume("mon", {"action": "rate", "rating": 2})
    told = trace(recommender.graph, "mon")
    answers = [step.answer for step in of(told.steps, "human")]
    assert [answer and answer["action"] for answer in answers] == ["refuse", "edit", "rate"]
    assert tuple(answers) == told.answers
    assert [(d.text, d.edited) for d in told.rationales] == [("Mine.", True)]
    assert taken(told)["human>reasoner"] == 1
    assert taken(told)["human>predictor"] == 1


def test_a_fork_begins_where_it_was_forked(fake: Fake) -> None:
    recommender = load(fake)
    run(recommender, "mon")
    name = recommender.fork("mon", {"without": [("ann", "rock")]})
    told = trace(recommender.graph, name)
    assert (told.status, told.forked_from) == ("stopped", "mon")
    assert (told.rationales, told.recommendation) == ((), None)
    assert [(s.node, s.standing) for s in told.steps] == (
        [("recall", "earlier"), *[("summarizer", "earlier")] * 4, ("reasoner", "pending")]
    )
    recommender.resume(name)
    told = trace(recommender.graph, name)
    assert taken(told) == {
        "summarizer>reasoner": 1,
        "reasoner>predictor": 1,
        "predictor>__end__": 1,
    }
    (summarizer,) = (node for node in told.nodes if node.name == "summarizer")
    assert (summarizer.steps, summarizer.earlier, summarizer.calls) == (0, 4, 0)
    assert [r.item_id for r in told.user_reviews] == ["folk"]
    before = [step for step in told.steps if step.standing == "earlier" and step.exchanges]
    assert len(before) == 4
    # The original is as it was.
    assert [s.standing for s in trace(recommender.graph, "mon").steps] == ["done"] * 7


def test_a_thread_that_served_two_runs_tells_the_latest(fake: Fake) -> None:
    recommender = load(fake)
    run(recommender, "mon", rationales=2)
    recommender.rate("ben", "folk", config=thread("mon"))
    told = trace(recommender.graph, "mon")
    assert (told.user_id, len(told.rationales)) == ("ben", 1)
    assert len(of(told.steps, "recall")) == 1
    assert taken(told)["__start__>recall"] == 1


def test_a_run_of_which_the_end_alone_is_kept(fake: Fake) -> None:
    recommender = load(fake)
    given: Any = {"user_id": "ann", "item_id": "target"}
    context: Any = {"record": True}
    recommender.graph.invoke(given, thread("mon"), context=context, durability="exit")
    told = trace(recommender.graph, "mon")
    assert told.status == "finished"
    assert told.recommendation is not None
    assert {step.standing for step in told.steps} == {"earlier"}
    assert sum(step.calls for step in told.steps) == 6
    assert len(of(told.steps, "summarizer")) == 4


# Asking ------------------------------------------------------------------------------------------


def test_unknown_runs_and_graphs_that_keep_none(fake: Fake) -> None:
    with pytest.raises(UnknownRunError, match="no run is kept under thread 'mon'"):
        trace(load(fake).graph, "mon")
    with pytest.raises(SettingError, match="keeps no runs"):
        trace(build_graph(Experts(fake())), "mon")


def test_another_process_can_tell_and_nothing_is_run(fake: Fake, tmp_path: Path) -> None:
    with open_runs(tmp_path / "runs.sqlite") as kept:
        recommender = load(fake, saver=kept)
        result = run(recommender, "mon", rationales=2, influence="same")
        before = trace(recommender.graph, "mon")

    def never(_: GenerateRequest) -> str:
        raise AssertionError("asked")

    with open_runs(tmp_path / "runs.sqlite") as kept:
        graph = build_graph(Experts(fake(write=never)), checkpointer=kept)
        told = trace(graph, "mon")
    assert told == before
    assert told.recommendation == result
