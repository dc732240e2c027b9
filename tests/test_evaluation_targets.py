"""Targets: told apart, drawn by lot, written down without a word of a review."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from r4r_graph import Review
from r4r_graph.errors import DataError, SettingError
from r4r_graph.evaluation.targets import (
    as_pairs,
    by_lot,
    digest_targets,
    draw,
    earlier_reviews,
    load_targets,
    record_sample,
    row_key,
)
from r4r_graph.ratings import RatingScale
from r4r_graph.reviews import TableReviewSource
from tests.tiny_reviews import make_reviews, write_reviews

TARGETS = [Review(f"u{n % 7}", f"i{n}", 1.0 + n % 5, 1000.0 + n, text="secret") for n in range(40)]


def test_a_file_of_reviews_is_one_of_targets_in_its_order(tmp_path: Path) -> None:
    rows = make_reviews()
    found = load_targets(write_reviews(tmp_path / "targets.parquet", rows), RatingScale())
    assert [(r.user_id, r.item_id, r.timestamp, r.rating, r.text) for r in found] == [
        (r["user_id"], r["item_id"], r["timestamp"], r["rating"], r["review"]) for r in rows
    ]
    assert [(p.user_id, p.item_id, p.as_of) for p in as_pairs(found)] == list(map(row_key, found))


def test_targets_that_no_prediction_could_tell_apart_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "twice.jsonl"
    row = {"user_id": "mara", "item_id": "x", "timestamp": 5, "review": ""}
    file.write_text("\n".join(json.dumps(row | {"rating": rating}) for rating in (1, 2)))
    with pytest.raises(DataError, match=r"target 2 \(user 'mara', item 'x'\) is there twice"):
        load_targets(file, RatingScale())


def test_a_sample_is_drawn_by_lot_and_keeps_the_order() -> None:
    ten = draw(TARGETS, 10, seed=0)
    assert len(ten) == 10
    assert [t for t in TARGETS if t in ten] == ten
    assert draw(TARGETS, 10, seed=1) != ten
    assert set(ten) <= set(draw(TARGETS, 11, seed=0))
    assert set(draw(TARGETS[::-1], 10, seed=0)) == set(ten)
    assert draw(TARGETS, None, seed=0) == draw(TARGETS, 41, seed=0) == TARGETS
    assert [t for t in by_lot(TARGETS, 0, "evaluate")[:10] if t not in ten] == []
    with pytest.raises(SettingError, match="sample=0"):
        draw(TARGETS, 0, seed=0)


def test_the_digest_is_of_the_rows_not_of_their_order() -> None:
    assert digest_targets(TARGETS) == digest_targets(TARGETS[::-1])
    assert digest_targets(TARGETS) != digest_targets(TARGETS[1:])


def test_the_sample_is_recorded_once_and_holds_no_review(tmp_path: Path) -> None:
    file = tmp_path / "new" / "sample.parquet"
    record_sample(TARGETS[:5], file)
    record_sample(TARGETS[:5], file)
    assert pq.read_table(file).column_names == ["user_id", "item_id", "as_of"]
    assert [tuple(row.values()) for row in pq.read_table(file).to_pylist()] == list(
        map(row_key, TARGETS[:5])
    )
    assert b"secret" not in file.read_bytes()
    with pytest.raises(DataError, match="records other rows"):
        record_sample(TARGETS[:6], file)


def test_floors_are_fitted_on_what_is_earlier_than_every_target() -> None:
    source = TableReviewSource.from_reviews(TARGETS)
    train = earlier_reviews(source, [TARGETS[20], TARGETS[15]])
    assert sorted(review.timestamp for review in train) == [1000.0 + n for n in range(15)]
    with pytest.raises(DataError, match="no review is earlier than the first target"):
        earlier_reviews(source, TARGETS)
    with pytest.raises(DataError, match="pass the training rows"):
        earlier_reviews(object(), TARGETS)  # type: ignore[arg-type]
