"""Influence: what the rating is without each thing that was read, against figures by hand."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command

from r4r_graph.engine.base import GenerateRequest, RateRequest
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.evidence import TokenBudgets
from r4r_graph.runs import thread
from r4r_graph.schema import Influence, Recommendation
from tests.scripted import Bench, Request, Script, at, make_bench, mark, prompt, review

Fake = Callable[..., BatchingEngine]

TABLE = [
    review("ann", "folk", 1, 5),
    review("ann", "rock", 2, 1),
    review("ben", "target", 3, 2),
]
PAIR: Any = {"user_id": "ann", "item_id": "target", "as_of": at(9)}

STARS = {
    mark("ann", "folk"): 1.0,
    mark("ann", "rock"): -0.5,
    mark("ben", "target"): -0.25,
    "Reason": 0.125,
    "average 3.00 of 2": 0.5,
    "average 2.00 of 1": -0.375,
}
"""How far a word in the predictor's prompt moves the mean from 3."""


def mean(words: str) -> float:
    """The mean rating of a prompt."""
    return 3 + sum(stars for word, stars in STARS.items() if word in words)


def two_values(value: float) -> list[float]:
    """A distribution over 1 to 5 with this mean."""
    return [(5 - value) / 4, 0, 0, 0, (value - 1) / 4]


def by_words(request: RateRequest) -> Sequence[float]:
    return two_values(mean(prompt(request)))


def bench(fake: Fake, **settings: Any) -> Bench:
    return make_bench(fake, TABLE, **{"script": Script(weights=by_words), **settings})


def influence(row: dict[str, Any]) -> dict[tuple[str, str, str], tuple[float, float]]:
    """What is left out, to the mean without it and the change."""
    return {
        (one["what"], one["user_id"], one["item_id"]): (one["without"], one["change"])
        for one in row["influence"]
    }


def test_each_thing_is_left_out_once(fake: Fake) -> None:
    row = bench(fake).rate("ann", "target", at(9), influence="same")
    whole = 3 + sum(STARS.values())
    assert row["mean"] == pytest.approx(whole)
    wanted = {
        ("user_review", "ann", "folk"): 1.0,
        ("user_review", "ann", "rock"): -0.5,
        ("user_average", "", ""): 0.5,
        ("item_average", "", ""): -0.375,
        ("item_review", "ben", "target"): -0.25,
        ("rationale", "", ""): 0.125,
    }
    found = influence(row)
    assert set(found) == set(wanted)
    for what, change in wanted.items():
        assert found[what] == pytest.approx((whole - change, change))
    strengths = [abs(one["change"]) for one in row["influence"]]
    assert strengths == sorted(strengths, reverse=True)
    [folk] = [one for one in row["influence"] if one["item_id"] == "folk"]
    assert (folk["title"], folk["timestamp"]) == ("Folk", at(1))


def test_the_averages_stay_when_a_review_goes(fake: Fake) -> None:
    made = bench(fake)
    made.rate("ann", "target", at(9), influence="same")
    without = [r for r in made.script.ratings[1:] if mark("ann", "folk") not in prompt(r)]
    assert len(without) == 1
    assert "average 3.00 of 2" in prompt(without[0])
    assert "Reason 0." in prompt(without[0])


def test_all_is_rated_in_one_call_of_the_engine(fake: Fake) -> None:
    made = bench(fake)
    made.rate("ann", "target", at(9))
    backend: Any = made.engine._backend
    plain = list(backend.batches)
    assert plain[-2:] == [1, 1]
    row = made.rate("ann", "target", at(9), influence="same")
    assert backend.batches[len(plain) :] == [1, 1, 6]  # summaries are kept already
    usage = row["usage"]["influence"]
    assert (usage["calls"], usage["completion_tokens"]) == (6, 6)
    assert usage["prompt_tokens"] > 5 * row["usage"]["predictor"]["prompt_tokens"]
    assert len({request.siblings for request in made.script.ratings[-6:]} ^ {6}) == 0


def test_nothing_is_asked_unless_it_is_wanted(fake: Fake) -> None:
    made = bench(fake)
    row = made.rate("ann", "target", at(9))
    assert row["influence"] == []
    assert set(row["usage"]) == {"summarizer", "reasoner", "predictor"}
    assert len(made.script.ratings) == 1


def test_several_rationales_are_mixed_for_each_part(fake: Fake) -> None:
    def weights(request: RateRequest) -> Sequence[float]:
        words = prompt(request)
        drawn = re.search(r"Reason (\d)", words)
        return two_values(
            2 + (0 if drawn is None else int(drawn[1])) + (mark("ann", "folk") in words)
        )

    made = bench(fake, script=Script(weights=weights))
    row = made.rate("ann", "target", at(9), influence="same", rationales=2, sure=1.0)
    assert row["mean"] == pytest.approx(3.5)  # of 3 and 4
    found = influence(row)
    assert found["user_review", "ann", "folk"] == pytest.approx((2.5, 1.0))  # of 2 and 3
    assert found["user_review", "ann", "rock"] == pytest.approx((3.5, 0.0))
    assert found["rationale", "", ""] == pytest.approx((3.0, 0.5))
    assert row["usage"]["influence"]["calls"] == 2 * 5 + 1


# With rationales written anew ------------------------------------------------------------------


def echo(request: GenerateRequest) -> str:
    """A rationale that names what it read, and how it was drawn."""
    read = sorted(set(re.findall(r"mark_\w+", prompt(request))))
    return f"Reason {request.seed} {request.temperature} of {' '.join(read)}."


def test_a_new_rationale_is_written_without_the_review(fake: Fake) -> None:
    marks = [mark("ann", "folk"), mark("ann", "rock"), mark("ben", "target")]

    def weights(request: RateRequest) -> Sequence[float]:
        rationale = request.messages[2].content
        return two_values(2 + sum(stars in rationale for stars in marks) / 2)

    made = bench(fake, script=Script(rationale=echo, weights=weights))
    row = made.rate("ann", "target", at(9), influence="new")
    found = influence(row)
    for what in ("user_review", "ann", "folk"), ("item_review", "ben", "target"):
        assert found[what] == pytest.approx((3.0, 0.5))  # the new rationale names two reviews
    assert found["user_average", "", ""] == pytest.approx((3.5, 0.0))
    assert found["rationale", "", ""] == pytest.approx((2.0, 1.5))
    assert [(r.seed, r.temperature) for r in made.script.rationales] == [(0, 0.0)] * 4
    assert row["usage"]["influence"]["calls"] == 3 + 6
    same = made.rate("ann", "target", at(9), influence="same")
    assert influence(same)["user_review", "ann", "folk"] == pytest.approx((3.5, 0.0))


def test_all_new_rationales_are_written_at_once(fake: Fake) -> None:
    made = bench(fake)
    made.rate("ann", "target", at(9))
    backend: Any = made.engine._backend
    before = len(backend.batches)
    made.rate("ann", "target", at(9), influence="new")
    assert backend.batches[before:] == [1, 1, 3, 6]


def test_new_rationales_are_drawn_as_those_that_they_replace(fake: Fake) -> None:
    made = bench(fake, script=Script(rationale=echo, weights=by_words))
    knobs: Any = {"rationales": 3, "sure": 1.0, "temperature": 0.6, "seed": 2, "influence": "new"}
    made.rate("ann", "target", at(9), **knobs)
    drawn = [(r.seed, r.temperature, r.top_p) for r in made.script.rationales]
    assert sorted(drawn[3:]) == sorted(drawn[:3] * 3)
    # each part is rated with the rationales written for it, in the run's order
    anew = [r for r in made.script.ratings[3:] if mark("ann", "folk") not in r.messages[1].content]
    assert len(anew) == 3
    for request, (seed, _, _) in zip(anew, sorted(drawn[:3]), strict=True):
        assert f"Reason {seed} 0.6 of {mark('ann', 'rock')} {mark('ben', 'target')}." in prompt(
            request
        )


def test_what_a_person_wrote_is_not_written_anew(fake: Fake) -> None:
    made = bench(fake, checkpointer=InMemorySaver())
    context: Any = {"ask": True, "influence": "new", "rationales": 2, "round_size": 1, "sure": 1.0}
    made.graph.invoke(PAIR, thread("1"), context=context)
    made.graph.invoke(Command(resume={"action": "edit", "rationale": "Mine."}), thread("1"))
    written = len(made.script.rationales)
    state = made.graph.invoke(Command(resume="accept"), thread("1"))
    assert len(made.script.rationales) == written + 3  # one of the two, without each review
    last = made.script.ratings[2:]
    assert sum("Mine." in prompt(request) for request in last) == 5
    assert len(last) == 11
    assert len(state["recommendation"]["influence"]) == 6


def test_with_edited_rationales_alone_new_is_same(fake: Fake) -> None:
    made = bench(fake, checkpointer=InMemorySaver())
    made.graph.invoke(PAIR, thread("1"), context={"ask": True, "influence": "new"})  # type: ignore[call-overload]
    edit = Command(resume={"action": "edit", "rationale": "Mine."})
    state: Any = made.graph.invoke(edit, thread("1"))
    assert len(made.script.rationales) == 1
    assert state["recommendation"]["usage"]["influence"]["calls"] == 6


# What there is to leave out --------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["same", "new"])
def test_cold_start_has_a_rationale_alone(fake: Fake, mode: str) -> None:
    made = bench(fake)
    row = made.rate("ann", "target", at(0), influence=mode)
    assert row["cold_start"] == "both"
    assert influence(row) == {("rationale", "", ""): pytest.approx((3.0, 0.125))}
    assert row["usage"]["influence"]["calls"] == 1


def test_what_was_cut_from_the_evidence_has_no_influence(fake: Fake) -> None:
    made = bench(fake, budgets=TokenBudgets(side=32))
    table = [review("ann", f"long{n}", 3 + n) for n in range(8)]
    made = make_bench(fake, [*TABLE, *table], script=made.script, budgets=TokenBudgets(side=32))
    row = made.rate("ann", "target", at(19), influence="same")
    [cut] = [cut for cut in row["truncated"] if cut["what"] == "user_history"]
    assert "of 10 reviews left out" in cut["detail"]
    left = {one["item_id"] for one in row["influence"] if one["what"] == "user_review"}
    assert left
    assert left < {f"long{n}" for n in range(8)}
    assert "folk" not in left


def test_a_review_without_words_counts_too(fake: Fake) -> None:
    rows = [*TABLE[1:], review("ann", "mute", 3, 5, text="")]
    script = Script(
        weights=lambda r: two_values(3 + ('"Mute"' in prompt(r) and "2: 5;" in prompt(r)))
    )
    row = make_bench(fake, rows, script=script).rate("ann", "target", at(9), influence="same")
    assert influence(row)["user_review", "ann", "mute"] == pytest.approx((3.0, 1.0))


@pytest.mark.model
def test_for_real(real_engine: BatchingEngine) -> None:
    from langgraph.store.memory import InMemoryStore

    from r4r_graph import Recommender, caches

    sample = Path(caches.__file__).with_name("_demo")
    store = InMemoryStore()
    paths = sample / "reviews.jsonl", sample / "items.jsonl"
    rater = Recommender.load(*paths, engine=real_engine, store=store)
    found = rater.rate("mara", "glass-harbour", history=1, influence="same")
    assert {one.what for one in found.influence} == {
        *("user_review", "item_review", "rationale", "user_average", "item_average")
    }
    for one in found.influence:
        assert 1 <= one.without <= 5
        assert one.change == pytest.approx(found.distribution.mean - one.without)
    assert any(abs(one.change) > 1e-4 for one in found.influence)
    assert found.usage["influence"].calls == 5
    assert found.usage["influence"].seconds > 0


# How it travels --------------------------------------------------------------------------------


def test_it_survives_json(fake: Fake) -> None:
    row = bench(fake).rate("ann", "target", at(9), influence="new")
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    found = Recommendation.from_dict(row)
    assert found.to_dict() == row
    assert all(isinstance(one, Influence) for one in found.influence)
    old = {name: value for name, value in row.items() if name not in ("influence", "answers")}
    assert Recommendation.from_dict(old).influence == ()


def test_sync_and_async_agree(fake: Fake) -> None:
    found = []
    for world, mode in itertools.product(("sync", "async"), ("same", "new")):
        made = bench(fake, checkpointer=InMemorySaver())
        context = {"influence": mode, "rationales": 2}
        if world == "sync":
            state: Any = made.graph.invoke(PAIR, thread("1"), context=context)  # type: ignore[call-overload]
        else:
            state = asyncio.run(made.graph.ainvoke(PAIR, thread("1"), context=context))  # type: ignore[call-overload]
        for usage in state["recommendation"]["usage"].values():
            del usage["seconds"]
        found.append(state["recommendation"])
    assert found[0] == found[2]
    assert found[1] == found[3]


def test_a_failure_leaves_the_rating_and_is_tried_again(fake: Fake) -> None:
    broken = [True]

    def before(request: Request) -> None:
        without = isinstance(request, RateRequest) and mark("ann", "folk") not in prompt(request)
        if without and broken:
            broken.clear()
            raise RuntimeError("out of memory")

    made = bench(fake, script=Script(weights=by_words, before=before), checkpointer=InMemorySaver())
    with pytest.raises(Exception, match="out of memory"):
        made.graph.invoke(PAIR, thread("1"), context={"influence": "same"})  # type: ignore[call-overload]
    kept = made.graph.get_state(thread("1"))
    assert kept.next == ("influence",)
    assert kept.values["recommendation"]["mean"] == pytest.approx(3.5)
    state = made.graph.invoke(None, thread("1"))
    assert len(state["recommendation"]["influence"]) == 6
    assert len(made.script.rationales) == 1
