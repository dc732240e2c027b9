"""Forks: from each step, with each change; what is done anew, and what is refused."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.store.memory import InMemoryStore

from r4r_graph.engine.base import RateRequest
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.errors import EngineFailure, InputError, RunPausedError, SettingError
from r4r_graph.forks import fork
from r4r_graph.recommender import Recommender
from r4r_graph.runs import find, history, list_runs, open_runs, thread
from tests.scripted import Request, Script, at, mark, prompt, review

Fake = Callable[..., BatchingEngine]

TABLE = [
    review("ann", "folk", 1, 5),
    review("ann", "rock", 2, 1),
    review("ben", "target", 1, 2),
    review("cas", "target", 2, 4),
]
WEIGHTS = [0.0, 0.1, 0.2, 0.3, 0.4]


def load(
    fake: Fake, script: Script | None = None, saver: Any = None, rows: Any = TABLE
) -> Recommender:
    script = script or Script(weights=lambda _: WEIGHTS)
    engine = fake(write=script.write, rate=script.rate)
    saver = InMemorySaver() if saver is None else saver
    return Recommender.load(rows, engine=engine, store=InMemoryStore(), checkpointer=saver)


def kept(rater: Recommender, **knobs: Any) -> Any:
    return rater.rate("ann", "target", as_of=at(9), config=thread("mon"), **knobs)


def counts(script: Script) -> tuple[int, int, int]:
    return len(script.summaries), len(script.rationales), len(script.ratings)


def marks(request: Request) -> set[str]:
    """Of the reviews in a prompt."""
    return {
        name
        for name in ("folk", "rock", "ben", "cas")
        for user, item in [("ann", name) if name in ("folk", "rock") else (name, "target")]
        if mark(user, item) in prompt(request)
    }


# What is changed -------------------------------------------------------------------------------


def test_a_fork_is_a_run_of_its_own(fake: Fake) -> None:
    script = Script(weights=lambda _: WEIGHTS)
    rater = load(fake, script)
    first = kept(rater)
    before = [state.values for state in history(rater.graph, "mon")]
    new = rater.fork("mon", {})
    assert len(script.asked) == 4 + 2  # nothing has run yet
    again = rater.resume(new)
    assert (again.rating, again.rationale) == (first.rating, first.rationale)
    assert counts(script) == (4, 2, 2)  # the summaries are not made again
    assert [state.values for state in history(rater.graph, "mon")] == before
    forked, origin = list_runs(rater.graph)
    assert (forked.thread_id, forked.forked_from) == (new, "mon")
    assert (origin.thread_id, origin.forked_from) == ("mon", None)
    assert forked.started > origin.started


def test_another_rationale(fake: Fake) -> None:
    script = Script(weights=lambda _: WEIGHTS)
    rater = load(fake, script)
    kept(rater, rationales=3, sure=1.0)
    found = rater.resume(rater.fork("mon", {"rationale": " They hate it. "}))
    assert found.rationales == ("They hate it.",)
    assert found.answers == (
        {"about": "rationale", "action": "edit", "rationales": ["They hate it."]},
    )
    assert counts(script) == (4, 3, 4)
    assert "They hate it." in prompt(script.ratings[-1])
    assert found.usage["reasoner"].calls == 3  # what had been spent
    more: Any = {"rationale": "They hate it.", "knobs": {"rationales": 2, "sure": 1.0}}
    assert len(rater.resume(rater.fork("mon", more)).rationales) == 2


def test_another_rationale_is_not_asked_about(fake: Fake) -> None:
    rater = load(fake)
    with pytest.raises(RunPausedError):
        kept(rater, ask=True)
    assert rater.resume(rater.fork("mon", {"rationale": "Mine."})).rationale == "Mine."
    with pytest.raises(RunPausedError):  # the earlier run waits as before
        rater.resume("mon", "refuse")


@pytest.mark.parametrize("pair", [("ann", "folk"), ("ben", "target")])
def test_one_review_less(fake: Fake, pair: tuple[str, str]) -> None:
    script = Script(weights=lambda _: WEIGHTS)
    rater = load(fake, script)
    first = kept(rater)
    found = rater.resume(rater.fork("mon", {"without": [pair]}))
    assert counts(script) == (4, 2, 2)
    name = pair[1] if pair[0] == "ann" else pair[0]
    for request in (script.rationales[-1], script.ratings[-1]):
        assert marks(request) == {"folk", "rock", "ben", "cas"} - {name}
    read = {(a.user_id, a.item_id) for a in (*found.user_aspects, *found.item_aspects)}
    assert (len(read), pair in read) == (3, False)
    assert "average 3.00 of 2" in prompt(script.ratings[-1])  # of all ratings, as before
    assert len(first.user_aspects) + len(first.item_aspects) == 4


def test_one_review_less_with_the_same_rationales(fake: Fake) -> None:
    """What was rated with the review is rated again, in all rounds."""
    script = Script(weights=lambda _: WEIGHTS)
    rater = load(fake, script)
    kept(rater, rationales=4, round_size=2, sure=1.0)
    new = rater.fork("mon", {"without": [("ann", "folk"), ["ben", "target"]]}, at="reasoner")  # type: ignore[list-item]
    found = rater.resume(new)
    assert found.rationales == tuple(f"Reason {n}." for n in range(4))
    assert counts(script) == (4, 4, 8)
    assert all(marks(request) == {"rock", "cas"} for request in script.ratings[4:])
    assert len(find(rater.graph, new).values["distributions"]) == 4


def test_all_reviews_less(fake: Fake) -> None:
    rater = load(fake)
    kept(rater)
    pairs = [("ann", "folk"), ("ann", "rock"), ("ben", "target"), ("cas", "target")]
    for step in ("recall", "summarizer", "reasoner"):
        found = rater.resume(rater.fork("mon", {"without": pairs}, at=step))
        assert (found.user_aspects, found.item_aspects) == ((), ())


def test_another_read_out(fake: Fake) -> None:
    script = Script(weights=lambda _: WEIGHTS)
    rater = load(fake, script)
    first = kept(rater)
    found = rater.resume(rater.fork("mon", {"knobs": {"readout": "mode"}}))
    assert (found.rating, found.readout) == (5, "mode")
    assert found.distribution == first.distribution
    assert counts(script) == (4, 1, 2)


def test_the_influence_afterwards_costs_itself_alone(fake: Fake) -> None:
    script = Script(weights=lambda _: WEIGHTS)
    rater = load(fake, script)
    first = kept(rater)
    found = rater.resume(rater.fork("mon", {"knobs": {"influence": "same"}}))
    assert counts(script) == (4, 1, 1 + 4 + 3)
    assert len(found.influence) == 7
    assert found.distribution == first.distribution


def test_more_rationales_afterwards(fake: Fake) -> None:
    script = Script(weights=lambda _: WEIGHTS)
    rater = load(fake, script)
    kept(rater, rationales=2, sure=1.0)
    more: Any = {"knobs": {"rationales": 5}}
    found = rater.resume(rater.fork("mon", more, at="predictor"))
    assert found.rationales == tuple(f"Reason {n}." for n in range(5))
    assert counts(script) == (4, 5, 5)
    anew = rater.resume(rater.fork("mon", more))  # from the summaries on
    assert anew.rationales == found.rationales


def test_another_seed_draws_others(fake: Fake) -> None:
    rater = load(fake)
    kept(rater, rationales=2, sure=1.0)
    found = rater.resume(rater.fork("mon", {"knobs": {"seed": 1}}))
    assert found.rationales == ("Reason 1000003.", "Reason 1000004.")


def test_asking_afterwards(fake: Fake) -> None:
    rater = load(fake)
    kept(rater)
    for changes, step, about in (
        ({"knobs": {"ask": True}}, None, "rationale"),
        ({"knobs": {"ask": True}}, "reasoner", "rationale"),
        ({"knobs": {"ask_below": 0.9}}, "predictor", "rating"),
    ):
        new = rater.fork("mon", changes, at=step)  # type: ignore[arg-type]
        with pytest.raises(RunPausedError) as pause:
            rater.resume(new)
        assert pause.value.question["about"] == about
        assert rater.resume(new, "accept").answers[0]["about"] == about


# From which step -------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["recall", "summarizer", "reasoner", 1, 2, 3])
def test_the_rest_is_done_anew_from_each_step(fake: Fake, step: str | int) -> None:
    script = Script(weights=lambda _: WEIGHTS)
    rater = load(fake, script)
    first = kept(rater, record=True)
    found = rater.resume(rater.fork("mon", {}, at=step))
    late = step in ("reasoner", 3)
    assert counts(script) == (4, 1 if late else 2, 2)
    assert (found.rating, found.rationale) == (first.rating, first.rationale)
    assert [a.summary for a in found.user_aspects] == [a.summary for a in first.user_aspects]


def test_the_numbers_are_those_of_the_states(fake: Fake) -> None:
    rater = load(fake)
    kept(rater, rationales=4, round_size=2, sure=1.0)
    states = history(rater.graph, "mon")
    [second] = [s for s in states if (s.metadata or {})["step"] == 5]  # after the second reasoner
    new = rater.fork("mon", {}, at=5)
    [begun] = history(rater.graph, new)
    assert begun.values["rationales"] == second.values["rationales"]
    assert begun.next == ("predictor",)
    [last] = history(rater.graph, rater.fork("mon", {}, at="reasoner"))
    assert last.values["rationales"] == begun.values["rationales"]  # its last time


def test_after_a_person(fake: Fake) -> None:
    script = Script(weights=lambda _: WEIGHTS)
    rater = load(fake, script)
    with pytest.raises(RunPausedError):
        kept(rater, ask=True, ask_below=0.9)
    with pytest.raises(RunPausedError):
        rater.resume("mon", {"action": "edit", "rationale": "Mine."})
    rater.resume("mon", {"action": "rate", "rating": 2})
    later = rater.fork("mon", {"knobs": {"influence": "same"}}, at="human")
    found = rater.resume(later)
    assert (found.rating, found.rationale, len(found.influence)) == (2, "Mine.", 7)
    earlier = rater.fork("mon", {"without": [("ann", "folk")]}, at=4)
    with pytest.raises(RunPausedError):
        rater.resume(earlier)
    assert "folk" not in marks(script.ratings[-1])
    assert "Mine." in prompt(script.ratings[-1])
    with pytest.raises(InputError, match="a fork after human is too late to change readout"):
        rater.fork("mon", {"knobs": {"readout": "mode"}}, at="human")


def test_a_fork_of_a_fork(fake: Fake) -> None:
    rater = load(fake)
    kept(rater)
    new = rater.fork("mon", {"rationale": "Mine."})
    rater.resume(new)
    for step in (None, "human", 0):
        found = rater.resume(rater.fork(new, {"knobs": {"readout": "mode"}}, at=step))
        assert (found.rationale, found.readout) == ("Mine.", "mode")
    assert [run.forked_from for run in list_runs(rater.graph)] == [new, new, new, "mon", None]
    at_once = rater.fork(rater.fork("mon", {}), {"without": [("ann", "folk")]})
    assert len(rater.resume(at_once).user_aspects) == 1


def test_a_run_that_summarized_nothing(fake: Fake) -> None:
    script = Script(weights=lambda _: WEIGHTS)
    rater = load(fake, script, rows=[review("ann", "folk", 1, text=""), TABLE[2]])
    rater.rate("ann", "x", as_of=at(9), config=thread("mon"))
    found = rater.resume(rater.fork("mon", {"rationale": "Mine."}, at="recall"))
    assert found.rationale == "Mine."
    assert len(rater.resume(rater.fork("mon", {})).user_aspects) == 1
    assert counts(script) == (0, 2, 3)


def test_a_failed_run_is_forked_before_its_failure(fake: Fake) -> None:
    broken = [True]

    def before(request: Request) -> None:
        if isinstance(request, RateRequest) and broken:
            raise RuntimeError("out of memory")

    rater = load(fake, Script(before=before))
    with pytest.raises(EngineFailure):
        kept(rater)
    with pytest.raises(InputError, match=r"cannot be forked at 'predictor'.*2 summarizer, 3 rea"):
        rater.fork("mon", {}, at="predictor")
    broken.clear()
    assert rater.resume(rater.fork("mon", {"knobs": {"influence": "same"}})).influence
    assert rater.resume(rater.fork("mon", {"rationale": "Mine."})).rationale == "Mine."


def test_a_run_that_never_began_is_not_forked(fake: Fake) -> None:
    rater = load(fake)
    with pytest.raises(InputError):
        rater.rate("nobody", "nothing", config=thread("mon"))
    with pytest.raises(InputError, match=r"run mon cannot be forked; steps .* past: none"):
        rater.fork("mon", {})


def test_the_fork_may_be_named(fake: Fake) -> None:
    rater = load(fake)
    kept(rater)
    assert fork(rater.graph, "mon", {}, new="tue") == "tue"
    assert rater.resume("tue").rationale == "Reason 0."


def test_the_async_twin(fake: Fake) -> None:
    rater = load(fake)

    async def forked() -> Any:
        await rater.arate("ann", "target", as_of=at(9), config=thread("mon"))
        return await rater.aresume(await rater.afork("mon", {"rationale": "Mine."}, at="reasoner"))

    assert asyncio.run(forked()).rationale == "Mine."


FORK = """
    import sys
    from pathlib import Path
    from r4r_graph import Recommender, fake_engine
    from r4r_graph.runs import open_runs

    with open_runs(Path(sys.argv[1])) as kept, fake_engine() as engine:
        rater = Recommender.load(engine=engine, checkpointer=kept)
        fork = rater.fork("mon", {"without": [("ann", "folk")], "knobs": {"readout": "mode"}})
        found = rater.resume(fork)
        print([a.item_id for a in found.user_aspects], found.readout)
"""


def test_it_is_forked_in_another_process(fake: Fake, tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"
    with open_runs(path) as saver:
        kept(load(fake, saver=saver))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(FORK), path],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "['rock'] mode\n")


def test_a_forks_state_is_plain_json(fake: Fake) -> None:
    rater = load(fake)
    kept(rater, record=True, influence="same")
    for step in ("recall", "summarizer", "reasoner"):
        [state] = history(rater.graph, rater.fork("mon", {"without": [("ann", "folk")]}, at=step))
        assert json.loads(json.dumps(state.values)) == state.values


# What is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "step", "said"),
    [
        ({}, "predict", "cannot fork at 'predict'; steps are recall, summarizer, reasoner, human"),
        ({}, "influence", "cannot fork at 'influence'"),
        ({}, "human", "cannot be forked at 'human'.*1 recall, 2 summarizer, 3 reasoner, 4 pred"),
        ({}, 9, "run mon cannot be forked at 9; steps that it came past: 1 recall"),
        ({}, -1, "cannot be forked at -1"),
        ({}, 0, "cannot be forked at 0"),
        ({}, True, "cannot fork at True"),
        ({}, 1.5, "cannot be forked at 1.5"),
        ({}, "predictor", "after predictor, run mon has nothing left to do"),
        ({"knobs": {"ask_below": 0.1}}, "predictor", "nothing left to do"),
        ({"rationale": "x"}, "predictor", "too late to change rationale: .* after reasoner or"),
        ({"rationale": "x"}, "recall", "too early to change rationale"),
        ({"without": [("ann", "folk")]}, 4, "a fork after predictor is too late to change without"),
        ({"knobs": {"readout": "mode"}}, "predictor", "too late to change readout"),
        ({"knobs": {"seed": 2}}, "reasoner", "too late to change seed: .* after summarizer"),
        (
            {"rationale": "x", "knobs": {"top_p": 0.5}},
            "predictor",
            "too late to change rationale, top_p: that takes a fork after summarizer or earlier",
        ),
        ({"rationale": " "}, None, "a changed rationale is a text that is not blank"),
        ({"rationale": 3}, None, "a changed rationale is a text"),
        ({"rationale": None}, None, "a changed rationale is a text"),
        ({"without": [("ann", "jazz")]}, None, "no review of 'jazz' by 'ann'.*ann/folk, ann/rock"),
        ({"without": ["ab"]}, None, "a list of pairs"),
        ({"without": "ab"}, None, "a list of pairs"),
        ({"without": [("ann",)]}, None, "a list of pairs"),
        ({"without": [("ann", 3)]}, None, "a list of pairs"),
        ({"without": None}, None, "a list of pairs"),
        ({"knobs": ["seed"]}, None, "changed knobs are a mapping"),
        ({"knobs": {3: 4}}, None, "changed knobs are a mapping"),
        ({"knobs": {"history": 3}}, None, "histories are read before a run can be forked"),
        ({"reviews": []}, None, "cannot change reviews; what can be is rationale, without, knobs"),
    ],
)
def test_a_change_that_does_not_fit_is_refused(
    fake: Fake, changes: Any, step: Any, said: str
) -> None:
    rater = load(fake)
    kept(rater)
    with pytest.raises(InputError, match=said):
        rater.fork("mon", changes, at=step)
    assert [run.thread_id for run in list_runs(rater.graph)] == ["mon"]  # nothing is left of it


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"readouts": "mode"}, "unknown setting readouts; there are: history"),
        ({"readout": "best"}, "bad setting readout='best'"),
        ({"rationales": 0}, "bad setting rationales=0"),
        ({"temperature": "hot"}, "bad setting temperature='hot'"),
    ],
)
def test_a_bad_knob_is_named(fake: Fake, knobs: Any, said: str) -> None:
    rater = load(fake)
    kept(rater)
    with pytest.raises(SettingError, match=said):
        rater.fork("mon", {"knobs": knobs})
    assert len(list_runs(rater.graph)) == 1
