"""`r4r evaluate`, as someone calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.commands import R4r
from tests.scripted import Script, review

EARLIER = [
    review(f"u{u}", f"i{i}", day, 1 + (u + i + day) % 5)
    for day, (u, i) in enumerate((u, i) for u in range(6) for i in range(6))
]
TARGETS = [review(f"u{n % 6}", f"i{(n * 5 + 1) % 6}", 50 + n, 1 + n % 5) for n in range(12)]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with `reviews.jsonl`, `targets.jsonl` and `predictions.jsonl`."""
    write(tmp_path / "reviews.jsonl", [r.to_dict() for r in (*EARLIER, *TARGETS)])
    write(tmp_path / "targets.jsonl", [r.to_dict() for r in TARGETS])
    write(
        tmp_path / "predictions.jsonl",
        [
            {"user_id": t.user_id, "item_id": t.item_id, "as_of": t.timestamp, "rating": t.rating}
            for t in TARGETS[:-1]
        ],
    )
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def common(files: Path) -> list[object]:
    return [
        "evaluate", "--reviews", files / "reviews.jsonl", "--targets", files / "targets.jsonl",
        "--out", files / "out", "--resamples", 100,
    ]  # fmt: skip


def test_predictions_at_hand(r4r: R4r, files: Path) -> None:
    done = r4r(*common(files), "--predictions", files / "predictions.jsonl", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    [found] = report["predictors"]
    assert found["name"] == "predictions"
    assert found["scores"]["mean"]["missing"] == 1
    assert found["scores"]["mean"]["mae"]["value"] == pytest.approx(4 / 12)
    assert found["failures"] == ["u5 / i2: no row for this target"]
    assert report["facts"]["train_rows"] == 36
    out = files / "out"
    assert json.loads((out / "report.json").read_text()) == report
    assert "<html" in (out / "report.html").read_text()
    assert "item mean" in (out / "report.md").read_text().lower()
    assert pq.read_table(out / "sample.parquet").num_rows == 12


def test_adapters_beside_predictions_with_probes(r4r: R4r, files: Path, script: Script) -> None:
    arguments = [
        *common(files), "--predictions", f"theirs={files / 'predictions.jsonl'}",
        "--adapters", "ours=none", "--probe", "all", "--history", 3, "--sample", 6, "--seed", 1,
    ]  # fmt: skip
    done = r4r(*arguments)
    assert done.code == 0, done.err
    for words in ("theirs", "ours", "shrunk bias", "swapped"):
        assert words in done.out.lower()
    asked = len(script.asked)
    assert asked > 6 * 6
    again = r4r(*arguments, "--json")
    assert len(script.asked) == asked, "nothing is asked twice"
    report = json.loads(again.out)
    facts = report["facts"]
    assert [facts[name] for name in ("rows", "targets", "seed", "train_rows")] == [6, 12, 1, 36]
    ours = report["predictors"][1]
    assert [probe["condition"] for probe in ours["probes"]] == [
        "without_rationale", "swapped_rationale", "true_review", "without_texts", "averages_only",
    ]  # fmt: skip
    # The script rates all alike, whatever it reads.
    assert all(probe["moved"]["value"] == 0 for probe in ours["probes"])
    assert set(ours["against_first"]) == {"mean", "median", "mode"}


def test_another_sample_in_the_same_folder_is_refused(r4r: R4r, files: Path) -> None:
    first = [*common(files), "--predictions", files / "predictions.jsonl"]
    assert r4r(*first, "--sample", 6).code == 0
    done = r4r(*first, "--sample", 7)
    assert done.code == 2
    assert "records other rows" in done.complaint


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "nothing to evaluate: give --predictions or --adapters"),
        (("--adapters", "nowhere"), "'nowhere' is no folder"),
        (("--adapters", "none", "--probe", "nonsense"), "unknown probe 'nonsense'"),
        (("--adapters", "none", "--top", "1,x"), "bad --top '1,x'"),
        (("--adapters", "none", "--budgets", "review=1"), "review=1 is under"),
        (("--adapters", "none", "--budgets", "stars=9"), "bad --budgets 'stars=9'"),
        (("--adapters", "none", "--sample", "0"), "sample=0"),
        (("--adapters", "none", "--judge-url", "http://x"), "--judge-url without --judge"),
        (("--predictions", "nowhere.parquet"), "no such file"),
    ],
)
def test_bad_calls_are_refused(
    r4r: R4r, files: Path, script: Script, more: tuple[str, ...], message: str
) -> None:
    done = r4r(*common(files), *more)
    assert done.code == 2
    assert message in done.complaint
    assert script.asked == []


def test_floors_can_be_fitted_on_rows_of_ones_own(r4r: R4r, files: Path) -> None:
    """Where a target is among the earliest reviews, nothing is earlier than all of them."""
    early = [EARLIER[0], *TARGETS]
    write(files / "targets.jsonl", [r.to_dict() for r in early])
    call = [*common(files), "--predictions", files / "predictions.jsonl"]
    done = r4r(*call)
    assert done.code == 2
    assert "pass training rows that are no targets (--train)" in done.complaint
    write(files / "train.jsonl", [r.to_dict() for r in EARLIER[1:]])
    assert r4r(*call, "--train", files / "train.jsonl").code == 0


def test_what_floors_cannot_be_fitted_on_is_refused_before_anything_is_rated(
    r4r: R4r, files: Path, script: Script
) -> None:
    done = r4r(*common(files), "--adapters", "none", "--train", files / "targets.jsonl")
    assert done.code == 2
    assert "targets are training rows of the floors too" in done.complaint
    done = r4r(*common(files), "--adapters", "x=none", "--adapters", "x=none@averages_only")
    assert "two sets of predictions have one name: x, x" in done.complaint
    assert script.asked == []
