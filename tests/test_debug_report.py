"""The HTML file of a run: what it shows, that it stands alone, and that texts stay texts."""

from __future__ import annotations

import html
import json
import re
import stat
from pathlib import Path
from typing import Any

import pytest

from r4r_graph.debug import page
from r4r_graph.debug.report import CONTENTS, to_html, write_report
from r4r_graph.debug.trace import RunTrace, trace
from r4r_graph.engine.aspects import format_aspects
from r4r_graph.engine.base import GenerateRequest
from r4r_graph.errors import EngineFailure, R4RError, RunPausedError, SettingError
from r4r_graph.ratings import RatingScale
from r4r_graph.runs import open_runs
from r4r_graph.schema import AspectSummary, Review
from tests.commands import R4r
from tests.kept_runs import Fake, load, run, weights
from tests.pages import HOSTILE, Page
from tests.scripted import Script, at, prompt


def told(fake: Fake, **options: Any) -> RunTrace:
    recommender = load(fake)
    run(recommender, "mon", **options)
    return trace(recommender.graph, "mon")


def checked(html: str) -> Page:
    found = Page(html)
    found.check()
    return found


def hostile_run(fake: Fake, text: str) -> RunTrace:
    """A run in which everything that anybody can write is this text."""
    reviews = [
        Review(text + "u", f"i{text}", 4, at(1), text, text),
        Review(f"v{text}", f"j{text}", 2, at(2), text, text + "?"),
    ]

    def write(request: GenerateRequest) -> str:
        if request.format == "text":
            return text
        return format_aspects(AspectSummary((text,), (text,), (text,)))

    script = Script(weights=weights)
    script.write = write  # type: ignore[method-assign]
    recommender = load(fake, script, reviews=reviews)
    recommender.rate(
        text + "u",
        f"j{text}",
        record=True,
        influence="same",
        config={"configurable": {"thread_id": text.replace("\0", "")}},
    )
    return trace(recommender.graph, text.replace("\0", ""))


# What it shows -----------------------------------------------------------------------------------


def test_the_answer_comes_first_and_every_section_is_there(fake: Fake) -> None:
    run = told(fake, rationales=3, influence="same")
    shown = checked(to_html(run))
    assert re.findall(r'<section id="(\w+)"', shown.html) == [anchor for anchor, _ in CONTENTS]
    assert run.recommendation is not None
    assert run.distribution is not None
    head = shown.words.split("Why this rating")[0]
    assert f"ann on Target {run.recommendation.rating:.2f} of 5 mean" in head
    assert "✓ finished" in head
    assert "2 + 2 reviews read" in head
    why = shown.section("why")
    for label, p in run.distribution.to_dict().items():
        assert f"{label} {100 * p:.1f} %" in why
    for drawn in run.rationales:
        assert drawn.text in why
        assert drawn.distribution is not None
        assert f"mean {drawn.distribution.mean:.2f}" in why
    assert "the mixture over 3 rationales" in why


def test_influence_is_told_strongest_first_with_its_bar(fake: Fake) -> None:
    run = told(fake, influence="same")
    assert run.recommendation is not None
    shown = to_html(run)
    checked(shown)
    rows = re.findall(
        r"<tr><th scope=\"row\">(.*?)</tr>", shown.split('id="influence"')[1], re.DOTALL
    )
    influence = run.recommendation.influence
    most = abs(influence[0].change)
    assert most > 0
    for one, row in zip(influence, rows, strict=False):
        assert page.signed(one.change) in row
        assert f"{one.without:.2f}" in row
        assert row.count("raised" if one.change > 0 else "lowered") == 2
        left, width = map(float, re.findall(r'<rect x="([\d.]+)%" width="([\d.]+)%"', row)[0])
        assert width == pytest.approx(50 * abs(one.change) / most, abs=0.01)
        assert left == pytest.approx(50 if one.change > 0 else 50 - width, abs=0.02)
        if one.what == "user_review":
            assert one.title in row
        if one.what == "item_review":
            assert f"<bdi>{one.user_id}</bdi>" in row
    read = shown.split('id="read"')[1].split("</section>")[0]
    changes = re.findall(r'class="change \w+">(.*?)</span>', read)
    reviews = [one for one in influence if one.what.endswith("review")]
    assert sorted(changes) == sorted(page.signed(one.change) for one in reviews)


def test_every_prompt_and_output_is_there_word_for_word(fake: Fake) -> None:
    run = told(fake, rationales=2)
    shown = Page(to_html(run))
    for step in run.steps:
        for exchange in step.exchanges:
            for turn in exchange.prompt:
                assert turn.content in shown.inside["pre"]
            for output in exchange.outputs:
                if output.text is not None:
                    assert output.text in shown.inside["pre"]
    steps = shown.section("steps")
    assert "Identical prompts are shown once" in steps
    (predictor,) = (step for step in run.steps if step.node == "predictor")
    assert f"2 calls, {predictor.prompt_tokens:,} → 2 tokens" in steps
    assert "mass on the ratings before masking: 1.0000" in steps


def test_the_graph_says_how_often(fake: Fake) -> None:
    run = told(fake, rationales=2, round_size=1, sure=1.0)
    graph = checked(to_html(run)).section("graph")
    assert "recall to summarizer: taken 4 times" in graph
    assert "predictor to human: not taken" in graph
    assert "start → recall: ×1" in graph
    assert "summarizer 4 steps · " in graph
    again = load(fake)
    for _ in range(2):
        again.rate("ann", "target", config={"configurable": {"thread_id": "mon"}})
    graph = checked(to_html(trace(again.graph, "mon"))).section("graph")
    assert "4 steps · 4 from cache · " in graph


def test_the_json_is_all_of_it(fake: Fake) -> None:
    run = told(fake, influence="new", rationales=2)
    (text,) = checked(to_html(run)).inside["textarea"]
    assert json.loads(text) == json.loads(json.dumps(run.to_dict()))


def test_versions_settings_cuts_and_warnings(fake: Fake) -> None:
    long = Review("ann", "epic", 3, at(1), "Epic", "loud " * 500)
    recommender = load(fake, reviews=[long])
    run(recommender, "mon", user_history=None, as_of=at(9), readout="median")
    told = trace(recommender.graph, "mon")
    shown = checked(to_html(told))
    versions = shown.section("versions")
    for digest in told.model["prompts"].values():
        assert digest in versions
    assert "basefake" in versions
    assert "readoutmedian" in versions
    cut = shown.section("cut")
    assert "Cold start: the item has no earlier reviews" in cut
    assert "item 'target' appears nowhere" in cut
    assert "review of epic by ann: cut from 500 to 320 tokens" in cut
    assert "1 cut" in shown.words.split("Why this rating")[0]
    assert "before 2020-09-22 12:26:40 UTC" in shown.section("read")


def test_a_run_without_records_says_so(fake: Fake) -> None:
    shown = checked(to_html(told(fake, record=False)))
    assert "Prompts and outputs were not kept in this run" in shown.section("steps")
    assert "Its prompt was not kept." in shown.section("steps")


@pytest.mark.parametrize(
    "scale",
    ["-2,-1,0", "0-100", "0.5,1,1.5,2,2.5,3,3.5,4,4.5,5"],
    ids=["below-0", "long", "halves"],
)
def test_any_scale(fake: Fake, scale: str) -> None:
    values = RatingScale.parse(scale)
    script = Script(weights=lambda request: range(1, 1 + len(request.scale.values)))
    recommender = load(fake, script, reviews=[], scale=values)
    review = Review("ann", "x", values.low, 1.0, "X", "words")
    recommender.rate(
        "ann",
        "y",
        user_history=[review],
        item_history=[],
        config={"configurable": {"thread_id": "t"}},
    )
    run = trace(recommender.graph, "t")
    why = checked(to_html(run)).section("why")
    assert run.distribution is not None
    for label, p in run.distribution.to_dict().items():
        assert f"{label} {100 * p:.1f} %" in why


# Runs that did not end ---------------------------------------------------------------------------


def test_a_failed_run_shows_its_failure(fake: Fake) -> None:
    def before(request: Any) -> None:
        if "mark_ben" in prompt(request):
            raise EngineFailure("<b>out of memory</b>")

    recommender = load(fake, Script(before=before))
    with pytest.raises(EngineFailure):
        run(recommender, "mon")
    shown = checked(to_html(trace(recommender.graph, "mon")))
    head = shown.words.split("Why this rating")[0]
    assert "✕ failed" in head
    assert "This run failed in summarizer EngineFailure: <b>out of memory</b>" in head
    assert "The review is by ben." in head
    assert "r4r resume mon" in head
    assert "This run has not rated yet." in shown.section("why")
    assert "summarizer failed" in shown.section("graph")


def test_a_run_that_could_not_begin_shows_why(fake: Fake) -> None:
    recommender = load(fake)
    with pytest.raises(R4RError):
        recommender.rate("no", "body", config={"configurable": {"thread_id": "mon"}})
    shown = checked(to_html(trace(recommender.graph, "mon")))
    assert "This run failed in recall UnknownPairError: user 'no'" in shown.words
    assert "The run did not come to the reviews." in shown.section("read")
    assert "No step of it has ended." in shown.section("time")


def test_a_waiting_run_shows_its_question(fake: Fake) -> None:
    recommender = load(fake)
    with pytest.raises(RunPausedError):
        run(recommender, "mon", ask=True)
    shown = checked(to_html(trace(recommender.graph, "mon")))
    head = shown.words.split("Why this rating")[0]
    assert "It asks about the rationale." in head
    assert "r4r resume mon --answer edit --rationale TEXT" in head
    assert "human waits for a person" in shown.section("graph")
    recommender.resume("mon", {"action": "edit", "rationale": "My own."})
    shown = checked(to_html(trace(recommender.graph, "mon")))
    why = shown.section("why")
    assert "My own. edited by a person" in why
    assert "The rationale was edited" in why


def test_a_persons_rating_is_told_apart(fake: Fake) -> None:
    recommender = load(fake)
    with pytest.raises(RunPausedError):
        run(recommender, "mon", ask_below=1.0)
    assert "mean, so far" in checked(to_html(trace(recommender.graph, "mon"))).words
    recommender.resume("mon", {"action": "rate", "rating": 2.5})
    shown = checked(to_html(trace(recommender.graph, "mon")))
    assert "2.50 of 5 given by a person" in shown.words
    assert "The rating was replaced by 2.5" in shown.section("why")


def test_a_fork_says_what_it_is_of(fake: Fake) -> None:
    recommender = load(fake)
    run(recommender, "mon")
    name = recommender.fork("mon", {"rationale": "Other."})
    shown = checked(to_html(trace(recommender.graph, name)))
    assert "forked from mon" in shown.words
    assert "This run is not over It stands before predictor" in shown.words
    assert "ran before the fork" in shown.section("graph")
    recommender.resume(name)
    assert "✓ finished" in checked(to_html(trace(recommender.graph, name))).words


# Texts stay texts --------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_texts_stay_texts(fake: Fake, text: str) -> None:
    run = hostile_run(fake, text)
    shown = checked(to_html(run))
    calm = checked(to_html(hostile_run(fake, "calm words")))
    # The same elements, but for those that depend on times and counts.
    varying = {"line", "text", "rect", "p", "li", "span"}
    assert [tag for tag in shown.tags if tag not in varying] == [
        tag for tag in calm.tags if tag not in varying
    ]
    assert page.visible(run.rationales[0].text) in shown.inside["blockquote"][0]
    (written,) = shown.inside["textarea"]
    assert json.loads(written)["rationales"][0]["text"] == run.rationales[0].text
    shown.html.encode()


def test_no_character_is_there_that_steers_a_page(fake: Fake) -> None:
    shown = to_html(hostile_run(fake, HOSTILE[-1]))
    plain = html.unescape(shown)
    for steers in "\u202e\u2066\x00\x07\x1b\u2028":
        assert steers not in plain
    assert "‹U+202E›gnirts‹U+2066› " in plain


def test_visible_names_what_is_not_seen() -> None:
    assert page.visible("a\tb\n👩\u200d🚀 שלום") == "a\tb\n👩\u200d🚀 שלום"
    assert page.visible("\x1b\u202e") == "‹U+001B›‹U+202E›"
    assert page.visible(7) == 7
    assert json.loads(page.pretty_json(["\u202e\ud800\x7f\U000e0041"])) == [
        "\u202e\ud800\x7f\U000e0041"
    ]


def test_twenty_long_reviews_stay_under_a_megabyte(fake: Fake) -> None:
    """Reviews of 100 kB each, long titles, eight rationales, influence."""
    reviews = [
        *(
            Review("ann", f"i{n}", 1 + n % 5, at(n), f"Title {n} " + "la " * 300, "wow " * 25_000)
            for n in range(10)
        ),
        *(
            Review(f"u{n}", "target", 1 + n % 5, at(n), "Target", "meh " * 25_000)
            for n in range(10)
        ),
    ]
    script = Script(weights=weights, rationale=lambda request: f"Because {request.seed} " * 60)
    recommender = load(fake, script, reviews=reviews)
    run(recommender, "mon", rationales=8, sure=1.0, influence="same")
    told = trace(recommender.graph, "mon")
    shown = to_html(told)
    checked(shown)
    assert len(told.user_reviews) + len(told.item_reviews) == 20
    assert len(shown.encode()) < 1_000_000


# Writing it --------------------------------------------------------------------------------------


def test_the_file_is_whole_and_its_owners_own(fake: Fake, tmp_path: Path) -> None:
    run = told(fake)
    file = write_report(run, tmp_path / "new" / "run.html")
    assert file.read_text(encoding="utf-8") == to_html(run)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [p.name for p in file.parent.iterdir()] == ["run.html"]
    with pytest.raises(SettingError, match="cannot write"):
        write_report(run, tmp_path)
    with pytest.raises(SettingError, match="cannot write"):
        write_report(run, file / "below")


# The command -------------------------------------------------------------------------------------


def keep(fake: Fake, *names: str) -> None:
    with open_runs() as kept:
        recommender = load(fake, saver=kept)
        for name in names:
            run(recommender, name)


def test_r4r_report_writes_a_file_or_stdout(r4r: R4r, fake: Fake, tmp_path: Path) -> None:
    keep(fake, "mon")
    file = tmp_path / "run.html"
    done = r4r("report", "mon", "-o", file)
    assert (done.code, done.out) == (0, "")
    assert f"wrote {file}" in done.err
    checked(file.read_text(encoding="utf-8"))
    assert r4r("report", "mon").out == file.read_text(encoding="utf-8")


def test_r4r_report_of_what_is_not_there(r4r: R4r, tmp_path: Path) -> None:
    done = r4r("report", "nope", "-o", tmp_path / "run.html")
    assert done.code == 2
    assert done.complaint == "no run is kept under thread 'nope'; `r4r runs` lists them"
    assert not (tmp_path / "run.html").exists()


def test_a_file_that_cannot_be_written(r4r: R4r, fake: Fake, tmp_path: Path) -> None:
    keep(fake, "mon")
    done = r4r("report", "mon", "-o", tmp_path)
    assert done.code == 2
    assert "cannot write" in done.complaint


def test_a_report_is_written_of_whatever_a_run_came_to(fake: Fake, tmp_path: Path) -> None:
    from r4r_graph.cli.report import reported

    recommender = load(fake)
    with reported(recommender.graph, "none", None):
        pass
    with reported(recommender.graph, "good", tmp_path / "good.html"):
        run(recommender, "good")
    with pytest.raises(RunPausedError), reported(recommender.graph, "asks", tmp_path / "asks.html"):
        run(recommender, "asks", ask=True)
    for name, words in (("good", "✓ finished"), ("asks", "This run waits for a person")):
        shown = checked((tmp_path / f"{name}.html").read_text(encoding="utf-8"))
        assert words in shown.words
    with (
        pytest.raises(SettingError, match="unknown setting"),
        reported(recommender.graph, "bad", tmp_path / "bad.html"),
    ):
        run(recommender, "bad", nonsense=1)
    assert not (tmp_path / "bad.html").exists()
