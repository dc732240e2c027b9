"""Several data sets in one recipe: ids that bear their names, each split by its own time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.domains import by_domain, domain_of, floors, in_turns, review_source
from finetune.settings import Recipe, parse_recipe
from finetune.splits import make_splits, read_targets, training_ends
from r4r_graph import Review
from r4r_graph.errors import DataError, SettingError
from r4r_graph.evaluation import floor_predictions
from r4r_graph.reviews import load_reviews
from tests.tiny_reviews import make_reviews, write_reviews


@pytest.fixture
def two(tmp_path: Path) -> Recipe:
    """Two data sets with the same ids; the second is all later, and has an item catalogue."""
    rows = make_reviews(users=12, items=12)
    later = [{**row, "timestamp": row["timestamp"] + 1e8} for row in make_reviews(8, 8, seed=1)]
    items = tmp_path / "items.jsonl"
    items.write_text(json.dumps({"item_id": "i1", "title": "Named", "category": "film"}))
    return recipe(
        tmp_path,
        music={"reviews": str(write_reviews(tmp_path / "music.parquet", rows))},
        films={
            "reviews": str(write_reviews(tmp_path / "films.parquet", later)),
            "items": str(items),
        },
    )


def recipe(tmp_path: Path, **domains: dict[str, Any]) -> Recipe:
    splits = {"reward_rows": 0, "instruction_rows": 40, "validation_rows": 6, "test_rows": 4}
    return parse_recipe({"domains": domains, "work": str(tmp_path / "work"), "splits": splits})


def test_ids_bear_the_name_of_their_data_set(two: Recipe) -> None:
    source = review_source(two)
    assert source.knows_user("music/u0")
    assert source.knows_user("films/u0")
    assert not source.knows_user("u0")
    assert (source.item("films/i1", None).title, source.item("films/i1", None).category) == (
        "Named",
        "film",
    )
    assert source.item("music/i1", None).category == ""
    alone = load_reviews(two.domains["music"].reviews)
    when = 86400.0 * 50
    assert [(r.rating, r.text) for r in source.user_history("music/u1", when, 9)] == [
        (r.rating, r.text) for r in alone.user_history("u1", when, 9)
    ]
    assert source.user_stats("music/u1", when) == alone.user_stats("u1", when)
    names = {domain_of(two, review) for review in source}
    assert names == {"music", "films"}


def test_the_overall_mean_is_that_of_ones_own_data_set(two: Recipe) -> None:
    """At inference an expert meets one data set at a time."""
    source, late = review_source(two), 1e9
    for name, domain in two.domains.items():
        alone, pair = load_reviews(domain.reviews), ("u1", "i1")
        assert source.overall_stats(
            late, without_pair=(f"{name}/u1", f"{name}/i1")
        ) == alone.overall_stats(late, without_pair=pair)
    of_all = source.overall_stats(late)
    assert of_all.count == len(source)
    assert source.overall_stats(late, without_pair=("u1", "i1")) == of_all


def test_each_data_set_is_split_by_its_own_time(two: Recipe) -> None:
    report = make_splits(two)
    assert set(report.boundaries) == {"music", "films"}
    assert training_ends(two) == {name: start for name, (start, _) in report.boundaries.items()}
    for split in ("train", "validation", "test"):
        parts = by_domain(two, read_targets(two, split))
        sizes = [len(part) for part in parts.values()]
        assert min(sizes) > 0
        assert abs(sizes[0] - sizes[1]) <= 1, "rows are drawn in turns"
        for name, part in parts.items():
            validation, test = report.boundaries[name]
            for target in part:
                if split == "train":
                    assert target.timestamp < validation
                elif split == "validation":
                    assert validation <= target.timestamp < test
                else:
                    assert target.timestamp >= test
    assert make_splits(two).reused


def test_floors_are_those_of_ones_own_data_set(two: Recipe) -> None:
    make_splits(two)
    targets, train = read_targets(two, "test"), read_targets(two, "train")
    found = floors(two, targets, train)
    for name, some in by_domain(two, targets).items():
        own = floor_predictions(some, review_source(two), by_domain(two, train)[name])
        here = np.array([domain_of(two, target) == name for target in targets])
        for floor, points in own.items():
            np.testing.assert_array_equal(found[floor][here], points)
    assert len(set(found["global_mean"].tolist())) == 2


def test_turns_are_taken_until_all_have_ended() -> None:
    a, b = ([Review(user, f"i{n}", 3.0, float(n)) for n in range(3)] for user in "ab")
    order = "".join(review.user_id for review in in_turns([a, b[:1]]))
    assert order == "abaa"
    assert in_turns([]) == []


def test_files_are_named_once(tmp_path: Path) -> None:
    domain = {"reviews": "x.parquet"}
    for more, message in (
        ({"reviews": "y.parquet"}, "bad setting reviews: with `domains`"),
        ({"items": "y.parquet"}, "bad setting items"),
        ({"teacher": {"aspects": "y.parquet"}}, r"bad setting teacher\.aspects"),
        ({"domains": {"a/b": domain}}, "bad setting domains.a/b"),
    ):
        with pytest.raises(SettingError, match=message):
            parse_recipe({"domains": {"films": domain}, **more})


def test_the_data_set_that_is_too_small_is_named(tmp_path: Path) -> None:
    rows = make_reviews(users=12, items=12)
    good = str(write_reviews(tmp_path / "good.parquet", rows))
    small = str(write_reviews(tmp_path / "small.parquet", rows[:2]))
    with pytest.raises(DataError, match=r"small\.parquet has too few reviews to split by time"):
        make_splits(recipe(tmp_path, good={"reviews": good}, small={"reviews": small}))
