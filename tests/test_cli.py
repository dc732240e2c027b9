"""The command line: what goes to stdout, what to stderr, and how an error ends a command."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from r4r_graph import __version__, caches
from r4r_graph.cli.display import one_line_json, printable
from r4r_graph.engine.base import GenerateRequest
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.reviews import load_items, load_reviews
from r4r_graph.schema import Review
from tests.commands import Done, R4r
from tests.scripted import Request, Script, mark, review

Fake = Callable[..., BatchingEngine]

TABLE = [
    review("ann", "folk", 1, 5),
    review("ann", "rock", 2, 1),
    review("ben", "target", 1, 2.5),
]
PAIR = ("--user", "ann", "--item", "target")
SAMPLE = Path(caches.__file__).with_name("_demo")


def write_reviews(path: Path, *rows: Review | dict[str, Any]) -> Path:
    plain = [row.to_dict() if isinstance(row, Review) else row for row in rows]
    path.write_text("\n".join(map(json.dumps, plain)), encoding="utf-8")
    return path


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    return write_reviews(tmp_path / "reviews.jsonl", *TABLE)


# Rating ----------------------------------------------------------------------------------------


def test_json_is_one_object_and_notes_go_to_stderr(r4r: R4r, script: Script, reviews: Path) -> None:
    done = r4r("rate", "--reviews", reviews, *PAIR, "--json")
    assert done.code == 0
    assert done.out.count("\n") == 1
    found = json.loads(done.out)
    assert (found["user_id"], found["item_id"], found["rating"]) == ("ann", "target", 4.6)
    assert found["distribution"] == pytest.approx({"1": 0, "2": 0, "3": 0.1, "4": 0.2, "5": 0.7})
    assert (found["rationale"], "rationales" in found) == ("Reason 0.", False)
    assert found["usage"]["summarizer"]["calls"] == 3
    assert "no adapter for summarizer, reasoner, predictor" in " ".join(done.err.split())
    again = json.loads(r4r("rate", "--reviews", reviews, *PAIR, "--json").out)
    assert again["usage"]["summarizer"]["calls"] == 0
    assert again["usage"]["summarizer"]["cache_hits"] == 3


def test_options_reach_the_run(r4r: R4r, script: Script, reviews: Path, tmp_path: Path) -> None:
    items = tmp_path / "items.jsonl"
    items.write_text('{"item_id": "target", "title": "The Target", "category": "album"}\n')
    done = r4r(
        *("rate", "--reviews", reviews, "--items", items, *PAIR, "--json", "--history", 1),
        *("--rationales", 2, "--readout", "mode", "--seed", 3, "--as-of", "2020-09-16"),
    )
    found = json.loads(done.out)
    assert (found["title"], found["readout"], found["rating"]) == ("The Target", "mode", 5)
    assert [row["item_id"] for row in found["user_aspects"]] == ["rock"]
    assert found["rationales"] == ["Reason 3000009.", "Reason 3000010."]
    assert found["as_of"] == 1_600_214_400


def test_a_real_model_behind_the_command(r4r: R4r, tiny_base: Path, tmp_path: Path) -> None:
    silent = [Review(r.user_id, r.item_id, r.rating, r.timestamp, r.title) for r in TABLE]
    path = write_reviews(tmp_path / "reviews.jsonl", *silent)
    arguments = ("rate", "--reviews", path, *PAIR, "--base", tiny_base, "--json", "--device", "cpu")
    found = json.loads(r4r(*arguments).out)
    assert found["model"]["base"] == "tiny"
    assert found["model"]["adapters"] == dict.fromkeys(("summarizer", "reasoner", "predictor"))
    assert 1 <= found["rating"] <= 5


def test_a_person_sees_stars_bars_and_reasons(r4r: R4r, script: Script, reviews: Path) -> None:
    script.rationale = lambda _: "Short songs suit them, long ones do not."
    done = r4r("rate", "--reviews", reviews, *PAIR)
    assert done.code == 0
    assert done.out.count("Short songs suit them, long ones do not.") == 1
    assert "★★★★★ 4.60 of 5 (mean)" in done.out
    rows = dict(line.split(" ", 1) for line in done.out.splitlines() if line[:2] in ("5 ", "3 "))
    assert rows["5"].split() == ["█" * 21, "70.0", "%"]
    assert rows["3"].split() == ["█" * 3, "10.0", "%"]
    assert f"+ {mark('ann', 'folk')}" in done.out
    assert done.out.index("The user") < done.out.index(mark("ann", "rock"))
    assert done.out.index("The item's reviewers") < done.out.index(mark("ben", "target"))
    assert "time: summarizer" in done.out
    assert "time:" not in done.err


def test_a_person_is_told_what_is_missing_or_cut(r4r: R4r, script: Script, tmp_path: Path) -> None:
    path = write_reviews(tmp_path / "r.jsonl", review("ben", "target", 1, text="loud " * 500))
    done = r4r("rate", "--reviews", path, "--user", "zoe", "--item", "target", "--rationales", 3)
    flat = " ".join(done.out.split())
    assert "cold start: the user has no earlier reviews" in flat
    assert "warning: user 'zoe' appears nowhere in the reviews or items" in flat
    assert "cut: review: review of target by ben: cut from 500 to 320 tokens" in flat
    assert "mixed over 3 rationales" in flat
    assert "no earlier reviews" in flat.split("The user")[1].split("The item's")[0]


@pytest.mark.parametrize(
    ("scale", "stars"), [("1-10", "★★★★★"), ("-2,-1,0", "★★★★☆"), ("-1,0,1", "★★★★☆")]
)
def test_any_scale_has_five_stars(
    r4r: R4r, script: Script, tmp_path: Path, scale: str, stars: str
) -> None:
    script.weights = lambda request: [0.0] * (len(request.scale.values) - 2) + [0.3, 0.7]
    bare = [{"user_id": "ann", "item_id": "folk", "rating": 1, "timestamp": 5}]
    bare[0]["rating"] = 0 if scale.startswith("-") else 10
    path = write_reviews(tmp_path / "reviews.jsonl", *bare)
    done = r4r("rate", "--reviews", path, "--user", "ann", "--item", "x", f"--scale={scale}")
    assert done.code == 0
    assert f"\n{stars} " in done.out


# Hostile texts ---------------------------------------------------------------------------------

HOSTILE = "[red]boo[/red] \x1b[2J\x1b]0!owned\x07\x9b31m\u202eevil"
SEEN = "[red]boo[/red] [2J]0!owned31mevil"


@pytest.fixture
def hostile(tmp_path: Path, script: Script) -> Path:
    """Everything says `HOSTILE`."""
    script.rationale = lambda _: f"{HOSTILE} end\x1b"
    script.write = lambda request: (  # type: ignore[method-assign]
        script.rationale(request)
        if request.format == "text"
        else f"positive: {HOSTILE}\nnegative: {HOSTILE}\nvalues: none"
    )
    rows = [review("ann", "folk", 1, text=HOSTILE), review(HOSTILE, "target", 1, title=HOSTILE)]
    return write_reviews(tmp_path / "reviews.jsonl", *rows)


def test_texts_neither_steer_the_terminal_nor_are_markup(r4r: R4r, hostile: Path) -> None:
    for user in ("ann", HOSTILE, f"nobody {HOSTILE}"):
        done = r4r("rate", "--reviews", hostile, "--user", user, "--item", "target")
        assert done.code == 0
        for shown in (done.out, done.err):
            assert not any(character in shown for character in "\x1b\x07\x9b\u202e")
    assert f"on {SEEN}\n" in done.out  # the title
    assert f"Why\n{SEEN} end" in done.out  # the rationale
    assert f"+ {SEEN}" in done.out
    assert f"- {SEEN}" in done.out


def test_json_steers_no_terminal_either(r4r: R4r, hostile: Path) -> None:
    done = r4r("rate", "--reviews", hostile, *PAIR, "--json")
    assert not any(character in done.out for character in "\x1b\x07\x9b")
    found = json.loads(done.out)
    assert found["title"] == HOSTILE
    assert found["rationale"] == f"{HOSTILE} end\x1b".strip()


def test_errors_steer_no_terminal_either(r4r: R4r, script: Script, reviews: Path) -> None:
    done = r4r("rate", "--reviews", reviews, "--user", HOSTILE, "--item", HOSTILE)
    assert (done.code, "\x1b" in done.err, "\x9b" in done.err) == (2, False, False)
    assert "[red]boo[/red]" in done.complaint
    done = r4r("rate", "--reviews", f"{HOSTILE}.csv", *PAIR)
    assert (done.code, "\x1b" in done.err, "\x9b" in done.err) == (2, False, False)


def test_an_id_that_is_no_text_is_refused(r4r: R4r, script: Script, reviews: Path) -> None:
    done = r4r("rate", "--reviews", reviews, "--user", "\udcff", "--item", "target", "--json")
    assert done.code == 2
    assert "user_id '\\udcff'" in done.complaint


# Errors ----------------------------------------------------------------------------------------

GOOD = {"user_id": "ann", "item_id": "folk", "rating": 5, "timestamp": 1_600_000_000}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--as-of", "yesterday"], "--as-of 'yesterday'"),
        (["--as-of", "2015"], "--as-of 2015"),
        (["--as-of", "1600000000000"], "divide by 1000"),
        (["--readout", "best"], "readout='best'"),
        (["--history", "-1"], "history=-1"),
        (["--rationales", "0"], "rationales=0"),
        (["--rationales", "999"], "rationales=999"),
        (["--scale", "five"], "'five'"),
        (["--scale", "1-4"], "rating 5 is off the scale 1 to 4"),
        (["--items", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_a_bad_option_is_named(
    r4r: R4r, script: Script, reviews: Path, arguments: list[str], named: str
) -> None:
    done = r4r("rate", "--reviews", reviews, *PAIR, *arguments)
    assert (done.code, done.out) == (2, "")
    assert named in done.err
    assert done.complaint
    assert script.asked == []


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("r.csv", "user_id,item_id,rating\nann,folk,5\n", ["r.csv: no column timestamp"]),
        ("r.csv", "", ["r.csv: the file is empty"]),
        ("r.txt", "what?", ["r.txt: unknown kind of file"]),
        ("r.parquet", "no parquet", ["r.parquet: cannot be read"]),
        ("r.jsonl", [GOOD, GOOD | {"rating": 7}], ["r.jsonl: 1 bad row", "r.jsonl:2: rating 7"]),
        ("r.jsonl", [GOOD | {"timestamp": "soon"}], ["r.jsonl:1: bad timestamp 'soon'"]),
        ("r.jsonl", [GOOD | {"user_id": ""}, GOOD], ["r.jsonl:1: no user_id"]),
    ],
)
def test_bad_reviews_are_named_by_file_and_line(
    r4r: R4r, script: Script, tmp_path: Path, name: str, content: Any, said: list[str]
) -> None:
    path = tmp_path / name
    text = content if isinstance(content, str) else "\n".join(map(json.dumps, content))
    path.write_text(text, encoding="utf-8")
    done = r4r("rate", "--reviews", path, *PAIR)
    assert (done.code, done.out) == (2, "")
    assert str(path) in done.complaint
    assert all(words in done.err for words in said)


def test_a_file_that_is_not_there_is_named(r4r: R4r, tmp_path: Path) -> None:
    done = r4r("rate", "--reviews", tmp_path / "none.csv", *PAIR)
    assert (done.code, done.out) == (2, "")
    assert f"{tmp_path / 'none.csv'}: no such file" in done.complaint


def test_nobody_known_is_named(r4r: R4r, script: Script, reviews: Path) -> None:
    done = r4r("rate", "--reviews", reviews, "--user", "zoe", "--item", "poles", "--json")
    assert (done.code, done.out) == (2, "")
    assert "user 'zoe' and item 'poles' appear nowhere" in done.complaint


@pytest.mark.parametrize("base", ["/nowhere/base", "smollm3", "  "])
def test_an_unknown_base_is_named(r4r: R4r, reviews: Path, base: str) -> None:
    done = r4r("rate", "--reviews", reviews, *PAIR, "--base", base)
    assert (done.code, done.out) == (2, "")
    assert "base model" in done.complaint
    assert base.strip() in done.complaint


def test_a_bad_adapters_folder_is_named(
    r4r: R4r, reviews: Path, tiny_base: Path, tmp_path: Path
) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        done = r4r("rate", "--reviews", reviews, *PAIR, "--base", tiny_base, "--adapters", folder)
        assert (done.code, done.out) == (2, "")
        assert str(folder) in done.complaint


def test_an_unusable_cache_folder_is_named(
    r4r: R4r, script: Script, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("R4R_CACHE_DIR", str(reviews))  # a file
    done = r4r("rate", "--reviews", reviews, *PAIR)
    assert (done.code, done.out) == (2, "")
    assert str(reviews) in done.complaint
    assert "R4R_CACHE_DIR" in done.complaint


def test_a_failing_engine_is_exit_code_one(r4r: R4r, script: Script, reviews: Path) -> None:
    def before(request: Request) -> None:
        if isinstance(request, GenerateRequest) and request.format == "text":
            raise RuntimeError("out of memory")

    script.before = before
    done = r4r("rate", "--reviews", reviews, *PAIR, "--json")
    assert (done.code, done.out) == (1, "")
    assert "out of memory" in done.complaint


@pytest.mark.parametrize("arguments", [["rate"], ["rate", "--history", "ten"], ["rat"]])
def test_misuse_is_exit_code_two(r4r: R4r, arguments: list[str]) -> None:
    done = r4r(*arguments)
    assert (done.code, done.out) == (2, "")
    assert "Usage: " in done.err
    assert "Traceback" not in done.err


# Demo ------------------------------------------------------------------------------------------


def test_the_demo_rates_a_pair_and_shows_the_graph(r4r: R4r, script: Script) -> None:
    done = r4r("demo")
    assert done.code == 0
    assert "mara on Glass Harbour" in done.out
    assert done.out.count("Reason 0.") == 1
    assert "★" in done.out
    assert "predictor" in done.out.split("The graph that ran:")[1]
    assert len(script.summaries) == 13


def test_the_demos_sample_is_sound() -> None:
    items = load_items(SAMPLE / "items.jsonl")
    source = load_reviews(SAMPLE / "reviews.jsonl", items=items)
    assert 50 <= len(source) <= 70
    assert set(source.item_ids()) == set(items)
    assert all(item.title and item.category and item.description for item in items.values())
    written = list(source)
    assert not [r for r in written if (r.user_id, r.item_id) == ("mara", "glass-harbour")]
    assert all(r.title == items[r.item_id].title for r in written)
    assert len([r for r in written if not r.text.strip()]) == 1  # a rating without words
    assert len({(r.user_id, r.item_id) for r in written}) == len(written)


# Doctor, cache, version ------------------------------------------------------------------------


def test_the_doctor_finds_all_well(r4r: R4r, tiny_base: Path, tiny_adapters: Path) -> None:
    done = r4r("doctor", "--base", tiny_base, "--adapters", tiny_adapters)
    assert (done.code, "FAIL" in done.out) == (0, False)
    for what in ("python", "langgraph", "torch", "device", "base model", "adapter reasoner"):
        assert f"ok   {what}: " in done.out
    assert str(tiny_base) in done.out
    findings = json.loads(r4r("doctor", "--base", tiny_base, "--json").out)["findings"]
    assert all(finding["works"] for finding in findings)
    [untrained] = [f for f in findings if f["what"] == "adapter predictor"]
    assert "--adapters" in untrained["mend"]


def test_the_doctor_names_what_is_amiss(r4r: R4r, tmp_path: Path, tiny_base: Path) -> None:
    done = r4r("doctor", "--base", tmp_path / "nowhere")
    assert done.code == 1
    assert "FAIL base model: " in done.out
    assert "no such directory" in done.out
    done = r4r("doctor", "--base", tiny_base, "--adapters", tmp_path / "nowhere", "--json")
    assert done.code == 1
    assert [f["what"] for f in json.loads(done.out)["findings"] if not f["works"]] == ["adapters"]


def test_the_doctor_survives_a_missing_torch(
    r4r: R4r, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    done = r4r("doctor", "--base", tmp_path)
    assert done.code == 1
    assert "FAIL device: " in done.out
    assert "FAIL base model: " in done.out


def damage(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)


def test_a_damaged_cache_can_be_mended_as_told(r4r: R4r, script: Script, reviews: Path) -> None:
    store = caches.summary_store_path()
    damage(store)
    done = r4r("rate", "--reviews", reviews, *PAIR, "--json")
    assert done.code == 2
    assert str(store) in done.complaint
    assert "r4r cache clear" in done.complaint
    assert r4r("cache", "info").code == 2
    mended = r4r("cache", "clear")
    assert (mended.code, store.exists()) == (0, False)
    assert r4r("rate", "--reviews", reviews, *PAIR, "--json").code == 0


def test_the_doctor_sees_a_damaged_cache(r4r: R4r, tiny_base: Path) -> None:
    damage(caches.summary_store_path())
    done = r4r("doctor", "--base", tiny_base)
    assert done.code == 1
    assert "FAIL cache: " in done.out
    assert "r4r cache clear" in done.out


def test_the_cache_is_shown_and_cleared(r4r: R4r, script: Script, reviews: Path) -> None:
    assert "0 summaries" in r4r("cache", "info").out
    assert r4r("cache", "clear").out == "nothing to delete\n"
    r4r("rate", "--reviews", reviews, *PAIR, "--json")
    base = caches.base_models_dir() / "some-base"
    base.mkdir()
    (base / "model.safetensors").write_bytes(b"\0" * 2_000_000)

    shown = r4r("cache", "info").out
    assert str(caches.cache_dir()) in shown
    assert "3 summaries" in shown
    assert "2.0 MB  base model some-base" in shown
    told = json.loads(r4r("cache", "info", "--json").out)
    assert told["summaries"] == 3
    assert [(e["name"], e["holds_reviews"]) for e in told["kept"]] == [
        ("summaries", True),
        ("runs", True),
        ("base model some-base", False),
    ]
    assert "(3 summaries)" in r4r("cache", "clear").out
    assert (caches.count_summaries(), base.exists()) == (0, True)
    found = json.loads(r4r("rate", "--reviews", reviews, *PAIR, "--json").out)
    assert found["usage"]["summarizer"]["calls"] == 3
    assert "some-base" in r4r("cache", "clear", "--base-models").out
    assert (caches.count_summaries(), base.exists()) == (0, False)


def test_nothing_of_a_review_is_left_in_a_cleared_cache(
    r4r: R4r, script: Script, reviews: Path
) -> None:
    r4r("rate", "--reviews", reviews, *PAIR, "--json")
    word = mark("ann", "folk").encode()

    def kept() -> list[Path]:
        files = (f for f in caches.cache_dir().rglob("*") if f.is_file())
        return [file for file in files if word in file.read_bytes()]

    assert kept()
    other = sqlite3.connect(caches.summary_store_path())  # another process is at work
    other.execute("SELECT count(*) FROM store").fetchone()
    assert r4r("cache", "clear").code == 0
    other.close()
    assert kept() == []


def test_the_version(r4r: R4r) -> None:
    assert r4r("--version") == Done(0, f"{__version__}\n", "")


# The real model --------------------------------------------------------------------------------


def real(*arguments: object) -> subprocess.CompletedProcess[str]:
    code = "from r4r_graph.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        # threads that wait must not spin: on a busy machine that costs many times the time
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        timeout=1200,  # the machine may be busy
    )


@pytest.mark.model
def test_the_demo_for_real() -> None:
    done = real("demo")
    assert done.returncode == 0, done.stderr
    assert "mara on Glass Harbour" in done.stdout
    why = done.stdout.split("Why\n")[1].split("mara on")[0]
    assert len(why.split()) > 5
    assert "of 5 (mean)" in done.stdout
    assert len(re.findall(r"(?m)^[1-5] +█* +\d+\.\d %", done.stdout)) == 5
    assert "recall" in done.stdout.split("The graph that ran:")[1]
    assert "\x1b" not in done.stdout


@pytest.mark.model
def test_a_rating_for_real_repeats_itself_without_summarizing_again() -> None:
    arguments = (
        *("rate", "--reviews", SAMPLE / "reviews.jsonl", "--items", SAMPLE / "items.jsonl"),
        *("--user", "mara", "--item", "glass-harbour", "--history", 1, "--json"),
        *("--rationales", 2, "--seed", 5, "--as-of", "2026-01-01"),
    )
    first, second = (json.loads(real(*arguments).stdout) for _ in range(2))
    before, after = (found.pop("usage")["summarizer"] for found in (first, second))
    assert before["calls"] + before["cache_hits"] == 2
    assert (after["calls"], after["cache_hits"], after["completion_tokens"]) == (0, 2, 0)
    # Whether both draws share a forward pass is a matter of milliseconds: it moves the last bits.
    assert first["rationales"] == second["rationales"]
    assert first["mean"] == pytest.approx(second["mean"], abs=1e-3)
    assert len(set(first["rationales"])) == 2


def test_no_control_character_reaches_the_terminal_raw() -> None:
    raw = "a\x7fb\x9bc\x1bd\u2028e\u202ef\U000e0001"
    assert printable(f"one\n{raw}") == ("one\na\\u007fb\\u009bc\\u001bd\\u2028e\\u202ef\\U000e0001")
    line = one_line_json({"text": raw})
    assert json.loads(line) == {"text": raw}
    assert not set("\x7f\x9b\x1b\u2028\u202e") & set(line)
