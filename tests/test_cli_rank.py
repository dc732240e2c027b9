"""`r4r rank`: its table, its JSON, where candidates come from, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from r4r_graph.errors import EngineFailure
from tests.commands import R4r
from tests.scripted import Script, at, prompt, review

TABLE = [
    review("ann", "folk", 1, 5),
    review("ann", "mine", 2, 3),
    review("ben", "first", 1, 4, title="The \x1b[31mFirst"),
    review("cas", "first", 2, 2, title="The \x1b[31mFirst"),
    review("ben", "second", 1, 4),
    review("ben", "mine", 1, 4),
]


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    path = tmp_path / "reviews.jsonl"
    path.write_text("\n".join(json.dumps(row.to_dict()) for row in TABLE), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _likes_second(script: Script) -> None:
    script.weights = lambda request: (
        [0, 0, 0, 0, 1] if "Second" in prompt(request) else [0, 0, 1, 0, 0]
    )
    script.rationale = lambda _: "Short songs suit them. And so on."


def candidates(folder: Path, text: str, name: str = "candidates.txt") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_json_is_one_object(r4r: R4r, reviews: Path, tmp_path: Path) -> None:
    file = candidates(tmp_path, "first\n\n second \nfirst\nnowhere\n")
    done = r4r("rank", "--reviews", reviews, "--user", "ann", "--items-file", file, "--json")
    assert (done.code, done.out.count("\n")) == (0, 1)
    found = json.loads(done.out)
    assert [each["item_id"] for each in found["recommendations"]] == ["second", "first"]
    assert found["summary"].startswith("Best of 2 rated for ann: Second, mean 5.00")
    [failure] = found["failures"]
    assert (failure["item_id"], failure["error"]) == ("nowhere", "InputError")


def test_a_person_sees_a_table(r4r: R4r, reviews: Path, tmp_path: Path) -> None:
    file = candidates(tmp_path, "first\nsecond\nnowhere\n")
    done = r4r("rank", "--reviews", reviews, "--user", "ann", "--items-file", file)
    assert done.code == 0
    rows = [line.split() for line in done.out.splitlines() if line.strip()[:2] in ("1 ", "2 ")]
    assert [row[:3] for row in rows] == [["1", "5.00", "Second"], ["2", "3.00", "The"]]
    assert done.out.count("Short songs suit them.") == 3
    assert "And so on" not in done.out
    assert "not rated: nowhere: item 'nowhere' appears nowhere" in done.out
    assert "1 could not be rated." in done.out
    assert "\x1b[31m" not in done.out
    assert "candidates" in done.err
    assert "candidates" not in done.out


def test_candidates_by_popularity(r4r: R4r, reviews: Path) -> None:
    def chosen(*more: Any) -> Any:
        done = r4r("rank", "--reviews", reviews, "--user", "ann", "--json", *more)
        return json.loads(done.out)

    found = chosen("--candidates", 9)
    assert {each["item_id"] for each in found["recommendations"]} == {"first", "second"}
    assert [e["item_id"] for e in chosen("--candidates", 1)["recommendations"]] == ["first"]
    early = chosen("--candidates", 9, "--as-of", at(1.5), "--top-k", 2)
    assert early["as_of"] == at(1.5)
    assert (len(early["recommendations"]), early["rated"]) == (2, 3)  # `mine` was open then


def test_items_with_words_stand_for_themselves(r4r: R4r, reviews: Path, tmp_path: Path) -> None:
    file = candidates(tmp_path, "item_id,title\nnew,Second to None\nfirst,\n", "new.csv")
    done = r4r("rank", "--reviews", reviews, "--user", "ann", "--items-file", file, "--json")
    found = json.loads(done.out)["recommendations"]
    assert [(each["item_id"], each["title"]) for each in found] == [
        ("new", "Second to None"),
        ("first", "The \x1b[31mFirst"),
    ]


def test_options_reach_the_ratings(r4r: R4r, reviews: Path, script: Script) -> None:
    options = ("--rationales", 2, "--readout", "mode", "--history", 1, "--seed", 3)
    more = ("--candidates", 2, "--concurrency", 1, "--json")
    done = r4r("rank", "--reviews", reviews, "--user", "ann", *options, *more)
    for each in json.loads(done.out)["recommendations"]:
        assert each["readout"] == "mode"
        assert [r["item_id"] for r in each["user_aspects"]] == ["mine"]
    assert {request.seed for request in script.rationales} == {3000009, 3000010}
    assert {request.siblings for request in script.rationales} == {2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give the candidates as --items-file FILE, or a number of --candidates"),
        (("--candidates", 2, "--items-file", "x.txt"), "give the candidates as"),
        (("--candidates", 0), "bad --candidates 0"),
        (("--candidates", 2, "--top-k", 0), "bad --top-k 0"),
        (("--candidates", 2, "--concurrency", 0), "bad --concurrency 0"),
        (("--candidates", 2, "--as-of", "2015"), "--as-of 2015 may be a date or unix seconds"),
        (("--candidates", 2, "--as-of", "1990-01-01"), "no candidates for user 'ann'"),
        (("--items-file", "absent.txt"), "cannot read the candidates in absent.txt"),
        (("--items-file", "absent.csv"), "absent.csv"),
        (("--candidates", 2, "--rationales", 0), "rationales"),
    ],
)
def test_bad_input_is_one_line(
    r4r: R4r, reviews: Path, arguments: tuple[Any, ...], message: str
) -> None:
    done = r4r("rank", "--reviews", reviews, "--user", "ann", *arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.complaint


def test_a_file_without_candidates(r4r: R4r, reviews: Path, tmp_path: Path) -> None:
    for text, message in (("\n \n", "holds no candidates"), ("nowhere\n", "none of the 1")):
        file = candidates(tmp_path, text)
        done = r4r("rank", "--reviews", reviews, "--user", "ann", "--items-file", file)
        assert done.code == 2
        assert message in done.complaint


def test_an_engine_that_fails_for_all_is_no_bad_input(
    r4r: R4r, reviews: Path, script: Script
) -> None:
    def fail(_: Any) -> None:
        raise EngineFailure("away")

    script.before = fail
    done = r4r("rank", "--reviews", reviews, "--user", "ann", "--candidates", 2)
    assert done.code == 1
    assert "none of the 2 candidates could be rated: first: away" in done.complaint


def test_time_that_is_up_ends_it_with_the_code_of_a_failure(r4r: R4r, reviews: Path) -> None:
    asked = ("--reviews", reviews, "--user", "ann", "--timeout")
    done = r4r("rank", *asked, 0.0001, "--candidates", 2)
    assert (done.code, done.out) == (1, "")
    assert done.complaint.startswith("the run was not done after 0.0001 s")
    assert r4r("rank", *asked, 60, "--candidates", 2).code == 0
    done = r4r("rate", *asked, 0.0001, "--item", "first", "--no-keep")
    assert (done.code, done.out) == (1, "")
    assert r4r("rate", *asked, "nan", "--item", "first").code == 2


def test_time_that_is_up_in_bulk_is_the_failure_of_each_pair(
    r4r: R4r, reviews: Path, tmp_path: Path
) -> None:
    pairs = candidates(tmp_path, '{"user_id": "ann", "item_id": "first", "as_of": 9}', "p.jsonl")
    asked = ("bulk", "--reviews", reviews, "--pairs", pairs, "--out", tmp_path / "out")
    done = r4r(*asked, "--timeout", 0.0001)
    assert (done.code, json.loads(done.out)["failed"]) == (0, 1)
    assert "RunTimeoutError" in done.err
    done = r4r(*asked, "--retry-failed")
    assert json.loads(done.out)["failed"] == 0
