"""Soft targets from history statistics."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.domains import review_source
from finetune.estimates import statistical_estimates
from finetune.settings import Recipe, parse_recipe
from finetune.sft.examples import rating_examples
from finetune.splits import make_splits, read_targets
from r4r_graph.engine.tokens import HubTokenMeter
from r4r_graph.engine.weights import find_base, load_tokenizer
from r4r_graph.errors import DataError
from r4r_graph.evaluation.metrics import soft_targets
from r4r_graph.schema import Review
from tests.tiny_reviews import write_reviews


def two_kinds(users: int = 24, items: int = 24) -> list[dict[str, Any]]:
    """Users of even number love everything, the others hate it."""
    random = np.random.default_rng(0)
    rows = []
    for user in range(users):
        for item in random.permutation(items)[: items // 2].tolist():
            rating = random.choice([4.0, 5.0]) if user % 2 == 0 else random.choice([1.0, 1.5])
            rows.append(
                {
                    "user_id": f"u{user}",
                    "item_id": f"i{item}",
                    "title": f"Title {item}",
                    "rating": rating,
                    "timestamp": 86400.0 * len(rows),
                    "review": "Words.",
                }
            )
    order = random.permutation(len(rows)).tolist()
    return [{**rows[at], "timestamp": 86400.0 * (1 + n)} for n, at in enumerate(order)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Recipe:
    folder = tmp_path_factory.mktemp("estimates")
    made = parse_recipe(
        {
            "reviews": str(write_reviews(folder / "reviews.parquet", two_kinds())),
            "work": str(folder / "work"),
            "base": str(tiny_base),
            "splits": {"reward_rows": 0, "instruction_rows": 80, "averages_rows": 40},
        }
    )
    make_splits(made)
    return made


def key(target: Review) -> tuple[str, str, float]:
    return target.user_id, target.item_id, float(target.timestamp)


def test_they_say_what_the_averages_tell(recipe: Recipe) -> None:
    targets = read_targets(recipe, "train")
    source, values = review_source(recipe), np.array(recipe.rating_scale.values)
    found = statistical_estimates(recipe, targets)
    assert set(found) == {key(target) for target in targets}
    known = [t for t in targets if source.user_stats(t.user_id, t.timestamp).count >= 3]
    assert len(known) > 30
    for target in known:
        p = np.array(found[key(target)])
        assert p.shape == (5,)
        assert p.sum() == pytest.approx(1)
        assert p[2] == 0, "no rating of the training part lies near 3"
        assert (p @ values > 3) == (target.rating > 3)


def test_a_row_says_nothing_of_itself(recipe: Recipe) -> None:
    """A rating is changed, far off, where no history holds it: its own estimate stays."""
    targets = read_targets(recipe, "train")
    last = max(targets, key=lambda target: target.timestamp)
    before = statistical_estimates(recipe, [last])[key(last)]
    rows = [
        {**row, "rating": 3.0} if (row["user_id"], row["item_id"]) == key(last)[:2] else row
        for row in two_kinds()
    ]
    other = replace(recipe, reviews=write_reviews(recipe.reviews.with_name("other.parquet"), rows))
    changed = next(r for r in review_source(other) if key(r) == key(last))
    assert changed.rating == 3.0
    # The lot falls by what a review is, so the folds differ: what stays is that 3 is unheard of.
    after = statistical_estimates(other, [changed])[key(last)]
    assert after[2] == before[2] == 0


def test_the_shares_mix_them_into_the_targets(recipe: Recipe) -> None:
    meter = HubTokenMeter(load_tokenizer(find_base(recipe.base)))
    targets = read_targets(recipe, "train")[:6]
    said = statistical_estimates(recipe, targets)

    def made(**settings: float) -> list[tuple[float, ...] | None]:
        rating = replace(recipe.predictor, rationale_dropout=1.0, **settings)
        source = review_source(recipe)
        rows = rating_examples(targets, {}, source, {}, meter, recipe, rating, said)
        return [row.target for row in rows]

    ratings = np.array([target.rating for target in targets])
    own = [tuple(row) for row in soft_targets(ratings, recipe.rating_scale).tolist()]
    assert made() == own
    for share in (0.25, 1.0):
        for mixed, truth, target in zip(made(estimate_share=share), own, targets, strict=True):
            expected = (1 - share) * np.array(truth) + share * np.array(said[key(target)])
            assert mixed == pytest.approx(expected)
            assert sum(mixed or ()) == pytest.approx(1)


def test_too_few_rows_are_counted(tmp_path: Path, tiny_base: Path) -> None:
    small = parse_recipe(
        {
            "reviews": str(write_reviews(tmp_path / "r.parquet", two_kinds(8, 6))),
            "work": str(tmp_path / "work"),
            "base": str(tiny_base),
            "splits": {"reward_rows": 0, "instruction_rows": 9},
        }
    )
    make_splits(small)
    with pytest.raises(DataError, match=r"19 training rows are too few .* estimate_share"):
        statistical_estimates(small, read_targets(small, "train"))
