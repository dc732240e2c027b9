"""Predictions of anybody's making: matched to targets, never left out, never guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from r4r_graph import Recommender, Review, fake_engine
from r4r_graph.bulk import rate_pairs
from r4r_graph.engine.base import RateRequest
from r4r_graph.errors import DataError
from r4r_graph.evaluation.predictions import Predictions, read_predictions
from r4r_graph.evaluation.targets import as_pairs
from r4r_graph.ratings import RatingScale

SCALE = RatingScale()
TARGETS = [
    Review("mara", "a", 4.0, 100.0),
    Review("mara", "b", 2.0, 200.0),
    Review("noor", "a", 5.0, 300.0),
]


def read(path: Path, rows: list[dict[str, Any]], targets: list[Review] = TARGETS) -> Predictions:
    path.write_text("\n".join(map(json.dumps, rows)))
    return read_predictions(path, targets, SCALE, name="p")


def row(user: str, item: str, when: float | str | None = None, **more: Any) -> dict[str, Any]:
    return {"user_id": user, "item_id": item, **({} if when is None else {"as_of": when}), **more}


def test_what_bulk_wrote(tmp_path: Path) -> None:
    def rate(request: RateRequest) -> list[float]:
        if "noor-only" in request.messages[1].content:
            raise ValueError("scripted")
        return [0, 0, 0, 1, 3]

    reviews = [
        Review("mara", "c", 4.0, 1.0, title="fine", text="warm"),
        Review("noor", "c", 4.0, 1.0, title="noor-only", text="cold"),
    ]
    with Recommender.load(reviews, engine=fake_engine(rate=rate)) as recommender:
        rate_pairs(recommender, as_pairs(TARGETS), tmp_path / "out", rationales=2, sure=1.0)
    found = read_predictions(tmp_path / "out", TARGETS, SCALE, name="ours")
    assert found.probabilities is not None
    np.testing.assert_allclose(found.probabilities[:2], [[0, 0, 0, 0.25, 0.75]] * 2)
    assert np.isnan(found.probabilities[2]).all()
    np.testing.assert_allclose(found.points["mean"], [4.75, 4.75, np.nan])
    np.testing.assert_array_equal(found.points["mode"], [5, 5, np.nan])
    assert found.reasons[:2] == (None, None)
    assert "scripted" in (found.reasons[2] or "")
    assert [len(texts) for texts in found.rationales[:2]] == [2, 2]
    assert found.mass is not None
    np.testing.assert_array_equal(found.mass, [1, 1, np.nan])


def test_one_number_is_every_read_out_and_no_distribution(tmp_path: Path) -> None:
    found = read(
        tmp_path / "p.jsonl",
        [
            row("noor", "a", 300, rating=4.5),
            row("mara", "b", "1970-01-01T00:03:20", rating="3"),
            row("mara", "a", 100, error="no history", rating=None),
            row("someone", "else", 1, rating=99),
        ],
    )
    assert found.probabilities is None
    for points in found.points.values():
        np.testing.assert_array_equal(points, [np.nan, 3.0, 4.5])
    assert found.reasons == ("no history", None, None)


def test_a_target_without_a_row_has_no_prediction(tmp_path: Path) -> None:
    found = read(tmp_path / "p.jsonl", [row("mara", "a", 100, mean=4, median=4.2, mode=5)])
    assert found.reasons == (None, *["no row for this target"] * 2)
    assert [float(found.points[r][0]) for r in ("mean", "median", "mode")] == [4.0, 4.2, 5.0]


def test_a_time_may_be_left_out_where_no_pair_is_there_twice(tmp_path: Path) -> None:
    rows = [row("mara", "a", rating=1), row("mara", "b", rating=2), row("noor", "a", rating=3)]
    found = read(tmp_path / "p.jsonl", rows)
    np.testing.assert_array_equal(found.points["mean"], [1, 2, 3])
    with pytest.raises(DataError, match="are there twice, untimed"):
        read(tmp_path / "p.jsonl", [*rows, row("mara", "a", rating=1)])
    with pytest.raises(DataError, match="differ in their time alone"):
        read(tmp_path / "p.jsonl", rows, [*TARGETS, Review("mara", "a", 1.0, 900.0)])


def test_distributions_in_parquet_and_in_csv(tmp_path: Path) -> None:
    uniform = [0.2] * 5
    table = pa.table(
        {
            "user_id": ["mara"],
            "item_id": ["b"],
            "timestamp": [200],
            "distribution": [uniform],
            "rationale": ["Because."],
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    found = read_predictions(tmp_path / "p.parquet", TARGETS, SCALE, name="p")
    assert found.rationales == ((), ("Because.",), ())
    (tmp_path / "p.csv").write_text(
        'user_id,item_id,as_of,distribution\nmara,b,200,"[0,0,1,0,0]"\n'
    )
    again = read_predictions(tmp_path / "p.csv", TARGETS, SCALE, name="p")
    assert found.probabilities is not None
    assert again.probabilities is not None
    np.testing.assert_array_equal(found.probabilities[1], uniform)
    np.testing.assert_array_equal(again.points["mean"], [np.nan, 3, np.nan])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rating": 9}, "rating 9 is off the scale 1 to 5"),
        ({"rating": "good"}, "bad rating 'good': not a number"),
        ({"rating": float("inf")}, "not a finite number"),
        ({"distribution": [0.5, 0.5]}, "no distribution over 1, 2, 3, 4, 5"),
        ({"distribution": [0.5, 0.1, 0.1, 0.1, 0.1]}, "no distribution over"),
        ({"distribution": [0.2, 0.2, 0.2, 0.2, None]}, "no distribution over"),
        ({"distribution": "[0.2"}, "not a list in JSON"),
        ({"mean": 3, "median": 3}, "not all of mean, median, mode"),
    ],
)
def test_bad_values_are_named_with_their_place(
    tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / "p.jsonl", [row("mara", "a", 100, **more)])
    assert "p.jsonl:1" in str(caught.value)


def test_a_row_without_any_rating_counts_as_missing(tmp_path: Path) -> None:
    found = read(tmp_path / "p.jsonl", [row("mara", "a", 100)])
    assert found.reasons[0] == "the row holds no rating"
    assert np.isnan(found.points["mean"]).all()


def test_a_pair_twice_and_a_file_of_other_pairs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="are there twice at one time"):
        read(tmp_path / "p.jsonl", [row("mara", "a", 100, rating=r) for r in (1, 1)])
    with pytest.raises(DataError, match="not one of its rows is of a target"):
        read(tmp_path / "p.jsonl", [row("x", "y", 100, rating=1)])
