"""Two runs side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from r4r_graph.debug.diff import Fact, RunDiff, compare, to_html, write_diff
from r4r_graph.debug.trace import trace
from r4r_graph.engine.base import GenerateRequest
from r4r_graph.errors import EngineFailure, SettingError
from r4r_graph.recommender import Recommender
from r4r_graph.runs import open_runs, thread
from tests.commands import R4r
from tests.kept_runs import Fake, load, run, weights
from tests.pages import HOSTILE, Page
from tests.scripted import Script, prompt


def checked(difference: RunDiff) -> Page:
    found = Page(to_html(difference))
    found.check()
    return found


def fork(recommender: Recommender, changes: Any) -> RunDiff:
    """Run `mon` against its fork."""
    name = recommender.fork("mon", changes)
    recommender.resume(name)
    return compare(trace(recommender.graph, "mon"), trace(recommender.graph, name))


def text(pieces: Any, kind: str) -> list[str]:
    return [piece.strip() for what, piece in pieces if what == kind]


def test_a_run_against_itself_differs_in_nothing(fake: Fake) -> None:
    recommender = load(fake)
    run(recommender, "mon", influence="same", rationales=2)
    told = trace(recommender.graph, "mon")
    same = compare(told, told)
    assert (same.differing, same.only_a, same.only_b, same.resummarized) == ((), (), (), ())
    assert all(fact.a == fact.b for fact in (*same.readouts, *same.nodes, *same.edges))
    assert all(pair.a == pair.b for pair in (*same.influence, *same.rationales))
    assert {fact.name for fact in same.same} >= {"user", "readout", "base", "predictor: prompt"}
    shown = checked(same)
    assert "Pair, settings, model and prompts are the same." in shown.section("differs")
    assert "Both read the same 4 reviews." in shown.section("differs")
    assert "The same in both: Reason 0." in shown.section("rationales")


def test_settings_that_differ_come_first(fake: Fake) -> None:
    recommender = load(fake)
    run(recommender, "mon")
    found = fork(recommender, {"knobs": {"readout": "mode"}})
    assert found.differing == (Fact("readout", "mean", "mode"),)
    shown = checked(found)
    assert "readoutmeanmode" in shown.section("differs").replace(" ", "")
    assert shown.html.index('id="differs"') < shown.html.index('id="ratings"')


def test_reviews_that_one_alone_read(fake: Fake) -> None:
    recommender = load(fake)
    run(recommender, "mon", influence="same")
    found = fork(recommender, {"without": [("ann", "folk")]})
    assert [review.item_id for review in found.only_a] == ["folk"]
    assert found.only_b == ()
    (pair,) = (pair for pair in found.influence if pair.item_id == "folk")
    assert pair.a is not None
    assert pair.b is None
    differs = checked(found).section("differs")
    assert "Folk by ann" in differs
    assert "no other reviews" in differs


def test_ratings_are_laid_over_each_other(fake: Fake) -> None:
    recommender = load(fake)
    run(recommender, "mon")
    found = fork(recommender, {"without": [("ann", "folk")]})
    a, b = found.a.distribution, found.b.distribution
    assert a is not None
    assert b is not None
    assert a != b
    (mean,) = (fact for fact in found.readouts if fact.name == "mean")
    assert (mean.a, mean.b) == (a.mean, b.mean)
    ratings = checked(found).section("ratings")
    for label, p in a.to_dict().items():
        assert f"{label} {100 * p:.1f} % {100 * b.to_dict()[label]:.1f} %".replace(" ", "") in (
            ratings.replace(" ", "")
        )
    assert f"mean{a.mean:.3f}{b.mean:.3f}" in ratings.replace(" ", "")


def test_words_that_one_alone_says_are_marked(fake: Fake) -> None:
    said = "Long records bore them, but the voice is warm."
    recommender = load(fake, Script(weights=weights, rationale=lambda _: said))
    run(recommender, "mon")
    found = fork(recommender, {"rationale": said.replace("bore them", "please her much")})
    (pair,) = found.rationales
    assert pair.compared
    assert "".join(piece for _, piece in pair.a or ()) == said
    assert text(pair.a, "changed") == ["bore them,"]
    assert text(pair.b, "changed") == ["please her much,"]
    shown = checked(found)
    assert [t.strip() for t in shown.inside["del"]] == ["bore them,"]
    assert [t.strip() for t in shown.inside["ins"]] == ["please her much,"]


def test_a_word_that_is_said_often_is_compared_like_any_other(fake: Fake) -> None:
    said = "the song and " * 100
    recommender = load(fake)
    run(recommender, "mon")
    texts = (f"{said}x", f"new {said}y")
    names = [recommender.fork("mon", {"rationale": each}) for each in texts]
    (pair,) = compare(*(trace(recommender.graph, name) for name in names)).rationales
    assert (text(pair.a, "changed"), text(pair.b, "changed")) == (["x"], ["new", "y"])


@pytest.mark.parametrize("other", ["Nothing of the sort at all, said he.", "word " * 3000])
def test_texts_that_share_little_are_told_as_wholes(fake: Fake, other: str) -> None:
    recommender = load(fake, Script(rationale=lambda _: "The voice is warm, the songs are short."))
    run(recommender, "mon")
    found = fork(recommender, {"rationale": other})
    (pair,) = found.rationales
    assert not pair.compared
    assert pair.b == (("same", other.strip()),)
    assert "They share too little" in checked(found).section("rationales")


def test_more_rationales_on_one_side(fake: Fake) -> None:
    recommender = load(fake)
    run(recommender, "mon", rationales=3)
    run(recommender, "tue", seed=1)
    found = compare(trace(recommender.graph, "mon"), trace(recommender.graph, "tue"))
    assert [pair.b is None for pair in found.rationales] == [False, True, True]
    assert "has none" in checked(found).section("rationales")


def test_what_moved_them_most_unlike_comes_first(fake: Fake) -> None:
    recommender = load(fake)
    run(recommender, "mon", influence="same")
    run(recommender, "tue", influence="same", user_history=[])
    run(recommender, "wed")
    mon, tue, wed = (trace(recommender.graph, name) for name in ("mon", "tue", "wed"))
    found = compare(mon, tue)
    apart = [abs((pair.a or 0) - (pair.b or 0)) for pair in found.influence]
    assert apart == sorted(apart, reverse=True)
    assert mon.recommendation is not None
    assert {pair.a for pair in found.influence if pair.a is not None} == {
        one.change for one in mon.recommendation.influence
    }
    assert checked(compare(wed, wed)).section("influence").endswith("Neither run was asked for it.")
    assert all(pair.b is None for pair in compare(mon, wed).influence)


def test_paths_and_times(fake: Fake) -> None:
    recommender = load(fake)
    run(recommender, "mon", rationales=2, round_size=1, sure=1.0)
    run(recommender, "tue", rationales=2, round_size=2)
    found = compare(trace(recommender.graph, "mon"), trace(recommender.graph, "tue"))
    assert Fact("predictor → reasoner", 1, 0) in found.edges
    assert Fact("recall → summarizer", 4, 4) in found.edges
    assert "human" in {fact.name for fact in found.nodes}
    work = checked(found).section("work").replace(" ", "")
    assert "predictor→reasoner1–" in work
    assert "4kept" in work


def test_runs_that_did_not_end_and_other_pairs(fake: Fake) -> None:
    def before(request: Any) -> None:
        if isinstance(request, GenerateRequest) and "mark_cy" in prompt(request):
            raise EngineFailure("out of memory")

    script = Script(weights=weights, before=before)
    recommender = load(fake, script)
    recommender.rate("ben", "folk", config=thread("ok"))
    with pytest.raises(EngineFailure):
        run(recommender, "bad")
    found = compare(trace(recommender.graph, "ok"), trace(recommender.graph, "bad"))
    assert Fact("status", "finished", "failed") in found.differing
    assert Fact("user", "ben", "ann") in found.differing
    shown = checked(found)
    head = shown.words.split("What differs")[0]
    assert "ben on Folk, and ann on Target" in head
    assert "EngineFailure: out of memory" in head
    assert {fact.b for fact in found.readouts} == {None}
    both = compare(found.b, found.b)
    assert "Neither has rated yet." in checked(both).section("ratings")


def test_the_json_holds_the_differences(fake: Fake) -> None:
    recommender = load(fake)
    run(recommender, "mon", influence="same")
    found = fork(recommender, {"without": [("ann", "folk")], "knobs": {"readout": "median"}})
    (written,) = checked(found).inside["textarea"]
    row = json.loads(written)
    assert row == json.loads(json.dumps(found.to_dict()))
    assert row["a"] == "mon"
    assert row["differing"][0] == {"name": "readout", "a": "mean", "b": "median"}


@pytest.mark.parametrize("words", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_texts_stay_texts(fake: Fake, words: str) -> None:
    recommender = load(fake, Script(rationale=lambda _: words))
    run(recommender, "mon")
    shown = checked(fork(recommender, {"rationale": f"{words} more {words}"}))
    assert len(shown.inside["script"]) == 1
    assert shown.inside["title"] == ["ann on Target: two runs"]


# The command -------------------------------------------------------------------------------------


def test_r4r_diff(r4r: R4r, fake: Fake, tmp_path: Path) -> None:
    with open_runs() as kept:
        recommender = load(fake, saver=kept)
        for name in ("mon", "tue"):
            run(recommender, name)
    file = tmp_path / "diff.html"
    done = r4r("diff", "mon", "tue", "-o", file)
    assert (done.code, done.out) == (0, "")
    Page(file.read_text(encoding="utf-8")).check()
    assert r4r("diff", "mon", "tue").out == file.read_text(encoding="utf-8")
    done = r4r("diff", "mon", "nope", "-o", file)
    assert (done.code, "under thread 'nope'" in done.complaint) == (2, True)


def test_the_file_is_written_as_a_report_is(fake: Fake, tmp_path: Path) -> None:
    recommender = load(fake)
    run(recommender, "mon")
    told = trace(recommender.graph, "mon")
    file = write_diff(told, told, tmp_path / "diff.html")
    assert file.read_text(encoding="utf-8") == to_html(compare(told, told))
    with pytest.raises(SettingError, match="cannot write"):
        write_diff(told, told, tmp_path)
