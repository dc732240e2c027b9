"""`r4r rate --ask`, `runs`, `show`, `resume`, `fork`: kept runs from the command line."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from r4r_graph import caches
from r4r_graph.cli.display import show_influence
from r4r_graph.engine.base import GenerateRequest
from r4r_graph.engine.batching import BatchingEngine
from tests.commands import Done, R4r
from tests.scripted import Request, Script, mark, review

Fake = Callable[..., BatchingEngine]

PAIR = ("--user", "ann", "--item", "target")
TABLE = [
    review("ann", "folk", 1, 5),
    review("ann", "rock", 2, 1),
    review("ben", "target", 1, 2.5),
]


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    path = tmp_path / "reviews.jsonl"
    path.write_text("\n".join(json.dumps(row.to_dict()) for row in TABLE), encoding="utf-8")
    return path


@pytest.fixture
def rate(r4r: R4r, script: Script, reviews: Path) -> Callable[..., Done]:
    """Rates the pair."""
    return lambda *options: r4r("rate", "--reviews", reviews, *PAIR, *options)


@pytest.fixture
def person(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sits at the terminal and types these lines."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def sit(*lines: str) -> None:
        monkeypatch.setattr(sys, "stdin", Terminal("".join(f"{line}\n" for line in lines)))

    return sit


def flat(text: str) -> str:
    return " ".join(text.split())


# Keeping ---------------------------------------------------------------------------------------


def test_a_rating_is_kept_and_listed(r4r: R4r, rate: Any) -> None:
    assert r4r("runs").out == "no runs are kept\n"
    assert json.loads(r4r("runs", "--json").out) == []
    done = rate()
    [name] = re.findall(r"kept as (\w+): r4r show \1", done.out)
    assert re.fullmatch(r"[0-9a-f]{8}", name)
    rate("--thread", "monday")
    told = json.loads(r4r("runs", "--json").out)
    assert [run["thread_id"] for run in told] == ["monday", name]
    assert set(told[0]) == {
        *("thread_id", "user_id", "item_id", "status", "started", "rating", "forked_from")
    }
    assert (told[0]["status"], told[0]["rating"]) == ("finished", 4.6)
    shown = r4r("runs").out.splitlines()
    assert shown[0].split() == ["run", "began", "user", "item", "status", "rating", "fork", "of"]
    line = r"monday +\d{4}-\d\d-\d\d [\d:]{8} +ann +target +finished +4\.60 *"
    assert re.fullmatch(line, shown[1])
    assert len(r4r("runs", "--limit", 1).out.splitlines()) == 2


def test_json_names_the_run(r4r: R4r, rate: Any) -> None:
    found = json.loads(rate("--json").out)
    assert json.loads(r4r("runs", "--json").out)[0]["thread_id"] == found["thread_id"]
    assert "thread_id" not in json.loads(rate("--json", "--no-keep").out)


def test_nothing_is_kept_where_that_is_wanted(r4r: R4r, rate: Any) -> None:
    done = rate("--no-keep")
    assert (done.code, "kept as" in done.out) == (0, False)
    assert not caches.runs_path().exists()
    for options in (["--ask"], ["--ask-below", 0.5], ["--thread", "x"]):
        done = rate("--no-keep", *options)
        assert (done.code, done.out) == (2, "")
        assert "without --no-keep" in done.complaint


def test_a_name_is_used_once(r4r: R4r, script: Script, rate: Any) -> None:
    rate("--thread", "monday")
    asked = len(script.asked)
    done = rate("--thread", "monday")
    assert (done.code, done.out, len(script.asked)) == (2, "", asked)
    assert "a run is kept as monday already" in done.complaint
    assert rate("--thread", " ").code == 2
    r4r("runs", "delete", "monday")
    assert rate("--thread", "monday").code == 0


def test_the_cache_tells_of_runs_and_clears_them(r4r: R4r, rate: Any) -> None:
    rate()
    assert re.search(r"MB +runs +\(from people's reviews\)", r4r("cache", "info").out)
    told = json.loads(r4r("cache", "info", "--json").out)["kept"]
    assert [(one["name"], one["holds_reviews"]) for one in told] == [
        ("summaries", True),
        ("runs", True),
    ]
    cleared = r4r("cache", "clear").out
    assert "deleted summaries (3 summaries)" in cleared
    assert "deleted runs: " in cleared
    assert r4r("runs").out == "no runs are kept\n"


def test_a_damaged_file_of_runs_is_named_and_mended(r4r: R4r, rate: Any) -> None:
    path = caches.runs_path()
    path.write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)
    for done in (rate(), r4r("runs"), r4r("show", "x"), r4r("resume", "x"), r4r("fork", "x")):
        assert (done.code, done.out) == (2, "")
        assert f"the file of runs {path} is damaged" in done.complaint
        assert "r4r cache clear" in done.complaint
    assert r4r("cache", "clear").code == 0
    assert rate().code == 0


# Deleting --------------------------------------------------------------------------------------


def test_runs_are_deleted(r4r: R4r, rate: Any) -> None:
    for name in ("a", "b", "c"):
        rate("--thread", name)
    done = r4r("runs", "delete", "a", "nobody")
    assert (done.code, done.out) == (2, "")
    assert "no run is kept under thread 'nobody'" in done.complaint
    assert len(json.loads(r4r("runs", "--json").out)) == 3  # none is deleted
    assert r4r("runs", "delete", "a", "a").out == "deleted 1 run\n"
    word = mark("ann", "folk").encode()
    assert r4r("runs", "delete", "--all").out == "deleted 2 runs\n"
    files = caches.cache_dir().glob("runs.sqlite*")
    assert not [file for file in files if word in file.read_bytes()]
    for misuse in ([], ["x", "--all"]):
        done = r4r("runs", "delete", *misuse)
        assert (done.code, "name the runs to delete" in done.complaint) == (2, True)


# Asking ----------------------------------------------------------------------------------------


def test_where_nobody_is_there_the_run_waits(r4r: R4r, script: Script, rate: Any) -> None:
    done = rate("--ask", "--thread", "q")
    assert done.code == 3
    assert done.out.count("Reason 0.") == 1
    assert "r4r resume q --answer accept" in done.out
    assert "r4r resume q --answer edit --rationale TEXT" in done.out
    assert script.ratings == []
    again = r4r("resume", "q")
    assert (again.code, again.out.count("Reason 0.")) == (3, 1)
    asked = len(script.asked)
    done = r4r("resume", "q", "--answer", "accept")
    assert done.code == 0
    assert "★★★★★ 4.60 of 5 (mean)" in done.out
    assert "kept as q" in done.out
    assert len(script.asked) == asked + 1  # the predictor alone


def test_json_asks_with_one_object(r4r: R4r, rate: Any, person: Any) -> None:
    person("accept")  # is not asked: a program reads
    done = rate("--ask-below", 0.9, "--thread", "q", "--json")
    assert (done.code, done.out.count("\n")) == (3, 1)
    asked = json.loads(done.out)
    assert (asked["waiting"], asked["thread_id"], asked["about"]) == (True, "q", "rating")
    assert asked["answers"] == ["accept", "rate"]
    again = r4r("resume", "q", "--json")
    assert (again.code, json.loads(again.out)) == (3, asked)
    done = r4r("resume", "q", "--answer", "rate", "--rating", 2, "--json")
    found = json.loads(done.out)
    assert (done.code, found["rating"], found["thread_id"]) == (0, 2, "q")
    assert found["answers"] == [{"about": "rating", "action": "rate", "rating": 2}]


def test_who_is_at_the_terminal_is_asked_there(
    r4r: R4r, script: Script, rate: Any, person: Any
) -> None:
    person("what", "refuse", "e", "", "edit", "They hate it.", "r", "seven", "rate", "1.5")
    done = rate("--ask", "--ask-below", 0.9)
    assert done.code == 0
    assert "action 'what' is none of accept, edit, refuse" in done.err
    assert "an edit holds a rationale, none of them blank" in done.err
    assert "rating 'seven' is no number from 1 to 5" in done.err
    assert done.err.count("accept, edit, refuse? ") == 4
    assert done.out.count("Reason 0.") == done.out.count("Reason 1.") == 1
    assert "★★☆☆☆ 1.50 of 5 (a person's rating)" in done.out
    assert "resume" not in done.out
    assert len(script.ratings) == 1


def test_who_leaves_is_told_how_to_answer_later(r4r: R4r, rate: Any, person: Any) -> None:
    person("refuse")  # and then the end of the input
    done = rate("--ask", "--thread", "q")
    assert done.code == 3
    assert "r4r resume q --answer refuse" in done.out
    person("accept")
    done = r4r("resume", "q")
    assert (done.code, "Reason 1." in done.out) == (0, True)


def test_several_rationales_are_shown_with_their_numbers(r4r: R4r, rate: Any, person: Any) -> None:
    person("edit", "First of mine.", "Second of mine.")
    done = rate("--ask", "--rationales", 2, "--json", "--thread", "q")
    assert done.code == 3
    done = r4r("resume", "q")
    assert "1. Reason 0.\n2. Reason 1.\n" in done.out
    assert done.code == 0
    shown = json.loads(r4r("show", "q", "--json").out)
    assert shown["recommendation"]["rationales"] == ["First of mine.", "Second of mine."]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--answer", "maybe"], "action 'maybe' is none of accept, edit, refuse"),
        (["--answer", "edit"], "an edit holds a rationale"),
        (["--rationale", " "], "none of them blank"),
        (["--rating", 3], "action 'rate' is none of accept, edit, refuse"),
    ],
)
def test_a_wrong_answer_is_refused_at_once(
    r4r: R4r, script: Script, rate: Any, options: list[Any], said: str
) -> None:
    rate("--ask", "--thread", "q")
    asked = len(script.asked)
    done = r4r("resume", "q", *options)
    assert (done.code, done.out, len(script.asked)) == (2, "", asked)
    assert said in done.complaint
    assert r4r("resume", "q", "--rationale", "Mine.").code == 0


# Resuming --------------------------------------------------------------------------------------


def test_a_failed_run_goes_on(r4r: R4r, script: Script, rate: Any) -> None:
    def before(request: Request) -> None:
        if isinstance(request, GenerateRequest) and request.format == "text":
            raise RuntimeError("out of memory")

    script.before = before
    done = rate("--thread", "q", "--readout", "mode")
    assert (done.code, done.out) == (1, "")
    assert "out of memory" in done.complaint
    assert "what is done is kept: r4r resume q" in done.err
    assert json.loads(r4r("runs", "--json").out)[0]["status"] == "failed"
    shown = flat(r4r("show", "q").out)
    assert "3 reasoner failed" in shown
    assert "out of memory" in shown
    script.before = lambda _: None
    done = r4r("resume", "q", "--json")
    assert (done.code, json.loads(done.out)["rating"]) == (0, 5)
    assert len(script.summaries) == 3


def test_what_the_command_loaded_is_loaded_again(
    r4r: R4r, script: Script, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[Any, ...]] = []
    from r4r_graph.recommender import Recommender

    load = Recommender.load

    def spy(*arguments: Any, **settings: Any) -> Any:
        loaded.append((*arguments, settings["scale"], settings["device"], settings["budgets"]))
        return load(*arguments, **settings)

    monkeypatch.setattr(Recommender, "load", spy)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapters").mkdir()
    first = r4r(
        *("rate", "--reviews", "reviews.jsonl", *PAIR, "--ask", "--thread", "q"),
        *("--adapters", "adapters", "--scale", "1-7", "--budgets", "side=99", "--device", "cpu"),
    )
    assert first.code == 3
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    reviews.unlink()  # they are read already
    script.weights = lambda r: [1.0] * len(r.scale.values)
    done = r4r("resume", "q", "--answer", "accept", "--json")
    assert (done.code, list(json.loads(done.out)["distribution"])) == (0, list("1234567"))
    (_, again) = loaded
    assert again[:6] == (None, None, "smollm2-135m", str(tmp_path / "adapters"), "1-7", "cpu")
    assert again[6].side == 99
    r4r("fork", "q", "--base", "other", "--adapters", "none", "--set", "rationale=Mine.")
    assert loaded[-1][2:5] == ("other", "none", "1-7")
    done = r4r("fork", "q", "--set", "influence=same", "--json")
    assert list(json.loads(done.out)["distribution"]) == list("1234567")
    assert json.loads(done.out)["influence"]


def test_a_refused_input_leaves_no_run(r4r: R4r, script: Script, reviews: Path) -> None:
    done = r4r("rate", "--reviews", reviews, "--user", "zoe", "--item", "poles", "--thread", "q")
    assert (done.code, "appear nowhere" in done.complaint) == (2, True)
    assert r4r("runs").out == "no runs are kept\n"
    page = reviews / "run.html"  # in a file
    done = r4r("rate", "--reviews", reviews, *PAIR, "--thread", "q", "--report", page)
    assert (done.code, str(page) in done.complaint) == (2, True)
    assert json.loads(r4r("runs", "--json").out)[0]["status"] == "finished"


def test_a_run_begun_by_another_program_is_gone_on_with(
    r4r: R4r, script: Script, fake: Fake, reviews: Path
) -> None:
    from langgraph.store.memory import InMemoryStore

    from r4r_graph.errors import RunPausedError, UnknownPairError
    from r4r_graph.recommender import Recommender
    from r4r_graph.runs import open_runs, thread

    with open_runs() as kept:
        engine = fake(write=script.write, rate=script.rate)
        rater = Recommender.load(TABLE, engine=engine, store=InMemoryStore(), checkpointer=kept)
        with pytest.raises(RunPausedError):
            rater.rate("ann", "target", ask=True, config=thread("q"))
        with pytest.raises(UnknownPairError):
            rater.rate("zoe", "poles", readout="mode", config=thread("unread"))
    assert r4r("resume", "q", "--answer", "accept").code == 0
    done = r4r("resume", "unread")
    assert (done.code, "run unread has not read its reviews yet" in done.complaint) == (2, True)
    assert "'poles' appear nowhere" in r4r("resume", "unread", "--reviews", reviews).complaint
    with reviews.open("a") as file:
        file.write("\n" + json.dumps(review("zoe", "folk", 3).to_dict()))
    done = r4r("resume", "unread", "--reviews", reviews, "--json")
    assert (done.code, json.loads(done.out)["rating"]) == (0, 5)


@pytest.mark.parametrize("command", ["show", "resume", "fork"])
def test_an_unknown_run_is_named(r4r: R4r, command: str) -> None:
    done = r4r(command, "nobody")
    assert (done.code, done.out) == (2, "")
    assert "no run is kept under thread 'nobody'" in done.complaint


def test_a_finished_run_is_not_resumed(r4r: R4r, script: Script, rate: Any) -> None:
    rate("--thread", "q")
    asked = len(script.asked)
    done = r4r("resume", "q")
    assert (done.code, "run q is finished; fork it" in done.complaint) == (2, True)
    assert len(script.asked) == asked


def test_it_is_resumed_by_another_process(r4r: R4r, rate: Any, tiny_base: Path) -> None:
    rate("--ask", "--thread", "q")
    code = "from r4r_graph.cli import main; main()"
    command = ("resume", "q", "--answer", "accept", "--base", str(tiny_base), "--json")
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "began with another model" in flat(done.stderr)
    assert json.loads(done.stdout)["model"]["base"] == "tiny"


# Forking ---------------------------------------------------------------------------------------


def test_forks(r4r: R4r, script: Script, rate: Any) -> None:
    rate("--thread", "monday")
    done = r4r("fork", "monday", "--set", "rationale=They = hate it.", "--thread", "tuesday")
    assert done.code == 0
    assert "kept as tuesday" in done.out
    found = json.loads(
        r4r(
            *("fork", "monday", "--at", "reasoner", "--json"),
            *("--set", "without=ann/folk", "--set", "without=ben/target"),
            *("--set", "readout=mode", "--set", "influence=same"),
        ).out
    )
    assert (found["rating"], found["rationale"]) == (5, "Reason 0.")
    assert [row["item_id"] for row in found["user_aspects"]] == ["rock"]
    assert {one["what"] for one in found["influence"]} == {
        *("user_review", "rationale", "user_average", "item_average")
    }
    found = json.loads(r4r("fork", "monday", "--at", 1, "--json", "--set", "rationales=2").out)
    assert len(found["rationales"]) == 2
    told = json.loads(r4r("runs", "--json").out)
    assert [run["forked_from"] for run in told] == ["monday", "monday", "monday", None]
    assert told[-2]["thread_id"] == "tuesday"
    assert "a fork of monday" in r4r("show", "tuesday").out
    assert json.loads(r4r("show", "tuesday", "--json").out)["status"] == "finished"


def test_a_fork_may_ask(r4r: R4r, rate: Any, person: Any) -> None:
    rate("--thread", "monday")
    done = r4r("fork", "monday", "--set", "ask=true", "--thread", "q")
    assert (done.code, "r4r resume q --answer accept" in done.out) == (3, True)
    person("accept")
    assert r4r("resume", "q").code == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--set", "readout"], "bad --set 'readout': write name=value"),
        (["--set", "readout=best"], "bad setting readout='best'"),
        (["--set", "readouts=mode"], "unknown setting readouts"),
        (["--set", "seed=1.5"], "bad setting seed=1.5"),
        (["--set", "without=ann/jazz"], "no review of 'jazz' by 'ann'"),
        (["--set", "without=ann"], "no review of '' by 'ann'"),
        (["--set", "rationale="], "a text that is not blank"),
        (["--set", "history=3"], "histories are read before"),
        (["--at", "predict"], "cannot fork at 'predict'"),
        (["--at", 17], "cannot be forked at 17"),
        (["--at", -1], "cannot be forked at -1"),
        (["--at", "predictor", "--set", "readout=mode"], "too late to change readout"),
        (["--thread", "monday"], "a run is kept as monday already"),
    ],
)
def test_a_fork_that_does_not_fit_is_refused(
    r4r: R4r, script: Script, rate: Any, options: list[Any], said: str
) -> None:
    rate("--thread", "monday")
    asked = len(script.asked)
    done = r4r("fork", "monday", *options)
    assert (done.code, done.out, len(script.asked)) == (2, "", asked)
    assert said in done.complaint
    assert len(json.loads(r4r("runs", "--json").out)) == 1


def test_ids_may_have_slashes(r4r: R4r, script: Script, tmp_path: Path) -> None:
    rows = [review("a/b", "c", 1), review("a", "b/d", 2), review("ben", "x", 1)]
    path = tmp_path / "slashes.jsonl"
    path.write_text("\n".join(json.dumps(row.to_dict()) for row in rows))
    r4r("rate", "--reviews", path, "--user", "a/b", "--item", "x", "--thread", "q")
    found = json.loads(r4r("fork", "q", "--set", "without=a/b/c", "--json").out)
    assert found["user_aspects"] == []


# Reports ----------------------------------------------------------------------------------------


def test_the_report_is_written_wherever_the_run_ends(
    r4r: R4r, script: Script, rate: Any, tmp_path: Path
) -> None:
    page = tmp_path / "run.html"

    def written() -> str:
        html = page.read_text(encoding="utf-8")
        page.unlink()
        return html

    assert rate("--ask", "--thread", "q", "--report", page).code == 3
    assert "Reason 0." in written()
    assert r4r("resume", "q", "--answer", "accept", "--report", page, "--json").code == 0
    assert "4.6" in written()
    assert r4r("fork", "q", "--set", "rationale=Mine.", "--report", page).code == 0
    assert "Mine." in written()
    script.before = lambda _: (_ for _ in ()).throw(RuntimeError("out of memory"))
    assert r4r("fork", "q", "--set", "rationale=More.", "--report", page).code == 1
    assert "out of memory" in written()
    done = rate("--no-keep", "--report", page)
    assert (done.code, page.exists()) == (2, False)


# Showing ---------------------------------------------------------------------------------------


def test_the_steps_are_shown(r4r: R4r, rate: Any) -> None:
    rate("--thread", "q", "--ask", "--influence", "same")
    waiting = flat(r4r("show", "q").out)
    assert "4 human waits Reason 0. The run waits as q." in waiting
    r4r("resume", "q", "--rationale", "Mine.")
    shown = flat(r4r("show", "q").out)
    for said in (
        "q ann on target",
        "finished, rated 4.60",
        "1 recall 0.0 s 2 reviews by the user, 1 of the item",
        "2 summarizer x3",
        "3 calls, 0 kept",
        f"+ {mark('ann', 'folk')}",
        "Reason 0.",
        "about the rationale: edit Mine.",
        "mean 4.60 (1: 0.0 %, 2: 0.0 %, 3: 10.0 %, 4: 20.0 %, 5: 70.0 %)",
        "6 influence",
        "user review ann folk",
    ):
        assert said in shown
    assert "How will this person rate" not in shown
    prompts = flat(r4r("show", "q", "--prompts").out)
    assert "How will this person rate" in prompts
    assert f"So much {mark('ann', 'folk')} in it." in prompts


def test_the_steps_as_json(r4r: R4r, rate: Any) -> None:
    rate("--thread", "q")
    done = r4r("show", "q", "--json")
    assert done.out.count("\n") == 1
    told = json.loads(done.out)
    assert (told["thread_id"], told["status"], told["question"]) == ("q", "finished", None)
    assert told["knobs"]["record"] is True
    steps = told["steps"]
    assert [(step["number"], step["node"]) for step in steps] == [
        (1, "recall"),
        (2, "summarizer"),
        (3, "reasoner"),
        (4, "predictor"),
    ]
    assert all(step["began"] <= step["ended"] for step in steps)
    assert [len(step["tasks"]) for step in steps] == [1, 3, 1, 1]
    records = [record for task in steps[1]["tasks"] for record in task["records"]]
    assert all(record["prompt"][1]["content"] for record in records)
    assert steps[3]["tasks"][0]["update"]["recommendation"] == told["recommendation"]
    assert steps[0]["tasks"][0]["update"]["summaries"] == {}


def test_hostile_texts_steer_no_terminal(r4r: R4r, script: Script, tmp_path: Path) -> None:
    hostile = "[red]boo[/red] \x1b[2J\x9b31m\u202eevil"
    script.rationale = lambda _: f"{hostile} end"
    rows = [review("ann", "folk", 1, text=hostile), review(hostile, "target", 1, title=hostile)]
    path = tmp_path / "hostile.jsonl"
    path.write_text("\n".join(json.dumps(row.to_dict()) for row in rows))
    name = f"q{hostile}"
    begun = r4r("rate", "--reviews", path, *PAIR, "--ask", "--influence", "same", "--thread", name)
    assert begun.code == 3
    shown = [
        begun,
        r4r("resume", name),
        r4r("resume", name, "--answer", "accept"),
        r4r("show", name, "--prompts"),
        r4r("show", name, "--json"),
        r4r("runs"),
        r4r("runs", "--json"),
        r4r("fork", name, "--set", f"rationale={hostile}"),
        r4r("show", f"{name}x"),
    ]
    for done in shown:
        text = done.out + done.err
        assert not any(character in text for character in "\x1b\x07\x9b\u202e")
    assert "[red]boo[/red]" in shown[3].out


def test_influence_bars(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from r4r_graph.schema import Influence

    found = [
        Influence("user_review", 3.0, 1.0, "ann", "folk", "Folk Songs", 5.0),
        Influence("item_review", 4.5, -0.5, "ben", "target", "Target", 5.0),
        Influence("rationale", 3.75, 0.25),
        *(Influence("item_average", 4.0, 0.0) for _ in range(9)),
    ]
    show_influence(found, Console(width=80))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["+1.00", "█" * 15, "their", "review", "of", "Folk", "Songs"]
    assert lines[3].split() == ["-0.50", "█" * 8, "the", "review", "by", "ben"]
    assert lines[4].split() == ["+0.25", "█" * 4, "the", "rationale"]
    assert lines[-1].strip() == "and 2 weaker ones"
    show_influence([Influence("rationale", 4.0, 0.0)], Console(width=80))
    assert "+0.00" in capsys.readouterr().out
    show_influence([], Console(width=80))
    assert capsys.readouterr().out == ""


def test_the_influence_is_shown(rate: Any) -> None:
    done = rate("--influence", "same")
    assert "What moved the mean rating" in done.out
    assert "influence 0.0 s (6 calls, 0 kept)" in flat(done.out)
    done = rate("--influence", "some")
    assert (done.code, "influence='some'" in done.complaint) == (2, True)
