"""Splits: by time without a leak, disjoint, drawn by seed alone, made once."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pandas
import pyarrow.parquet as pq
import pytest

from finetune.domains import review_source
from finetune.rows import is_cold
from finetune.settings import Recipe, SplitSettings, parse_recipe
from finetune.splits import SPLIT_SCHEMA, Split, make_splits, read_targets
from r4r_graph import Review
from r4r_graph.errors import DataError, InputError, NotReadyError, SettingError
from r4r_graph.evaluation.targets import by_lot
from r4r_graph.jobs import open_folder

DAY = 86400.0


def some_reviews(count: int = 300, users: int = 20, items: int = 15, seed: int = 0) -> list[Review]:
    """Days with many reviews each; every tenth review has no words."""
    dice = random.Random(seed)
    return [
        Review(
            f"u{dice.randrange(users)}",
            f"i{dice.randrange(items)}",
            float(dice.randint(1, 5)),
            DAY * dice.randrange(60),
            f"Title {n}",
            f"Words {n}." if n % 10 else " ",
        )
        for n in range(count)
    ]


Make = Callable[..., Recipe]


@pytest.fixture
def recipe_of(tmp_path: Path) -> Make:
    """Makes a recipe over reviews; settings of the splits by name."""

    numbers = count(1)  # a file is read once a process

    def make(reviews: list[Review] | None = None, seed: int = 42, **splits: Any) -> Recipe:
        file = tmp_path / f"reviews-{next(numbers)}.jsonl"
        rows = some_reviews() if reviews is None else reviews
        file.write_text("".join(json.dumps(r.to_dict()) + "\n" for r in rows))
        tree = {"reviews": str(file), "work": str(tmp_path / "work"), "seed": seed}
        return parse_recipe(
            {**tree, "splits": {"reward_rows": 40, "instruction_rows": 60} | splits}
        )

    return make


def keys(recipe: Recipe, split: Split, role: Any = None) -> list[str]:
    return [review.key for review in read_targets(recipe, split, role)]


def test_no_target_is_as_late_as_one_of_a_later_part(recipe_of: Make) -> None:
    recipe = recipe_of(reward_rows=4000, instruction_rows=6000)
    report = make_splits(recipe)
    parts: list[list[Review]] = [
        read_targets(recipe, split) for split in ("train", "validation", "test")
    ]
    assert all(parts)
    for earlier, later in pairwise(parts):
        assert max(r.timestamp for r in earlier) < min(r.timestamp for r in later)
    validation_from, test_from = report.boundaries[""]
    times = sorted(review.timestamp for review in review_source(recipe))
    assert min(r.timestamp for r in parts[1]) >= validation_from
    assert max(r.timestamp for r in parts[0]) < validation_from
    assert max(r.timestamp for r in parts[1]) < test_from <= min(r.timestamp for r in parts[2])
    # The boundaries lie within half a day's reviews of 8:1:1.
    for boundary, share in ((validation_from, 0.8), (test_from, 0.9)):
        day = times.count(boundary) + times.count(boundary - DAY)
        assert abs(sum(t < boundary for t in times) - share * len(times)) <= day


@pytest.mark.parametrize("wanted", range(1, 12))
def test_rows_of_one_timestamp_stay_together(recipe_of: Make, wanted: int) -> None:
    """Ten reviews a day: wherever a boundary falls, a day is never cut in two."""
    reviews = [
        Review(f"u{n % 7}", f"i{n}", 3.0, DAY * (n // 10), "", f"Words {n}.") for n in range(200)
    ]
    share = 0.5 + wanted / 200
    recipe = recipe_of(
        reviews,
        train=share,
        validation=0.2,
        eligible="all",
        reward_rows=4000,
        instruction_rows=6000,
    )
    report = make_splits(recipe)
    for split in ("train", "validation", "test"):
        times = [review.timestamp for review in read_targets(recipe, split)]
        assert all(times.count(time) == 10 for time in times)
    assert abs(report.reward + report.instruction - 200 * share) <= 5


def test_reward_and_instruction_rows_are_disjoint(recipe_of: Make) -> None:
    repeated = [*some_reviews(), *some_reviews()[:50]]
    recipe = recipe_of(repeated, reward_rows=4000, instruction_rows=6000)
    report = make_splits(recipe)
    reward, instruction = keys(recipe, "train", "reward"), keys(recipe, "train", "instruction")
    assert (len(reward), len(instruction)) == (report.reward, report.instruction)
    assert not set(reward) & set(instruction)
    assert len({*reward, *instruction}) == len(reward) + len(instruction)
    assert sorted([*reward, *instruction]) == sorted(keys(recipe, "train"))
    assert report.reviews == 300  # a review that is there twice is one
    # Too few for both: cut in proportion, everything used.
    assert report.reward / (report.reward + report.instruction) == pytest.approx(0.4, abs=0.01)
    # The reward model reads the review itself.
    assert all(review.text.strip() for review in read_targets(recipe, "train", "reward"))


def test_enough_rows_give_what_was_asked_for(recipe_of: Make) -> None:
    report = make_splits(recipe := recipe_of(validation_rows=7, test_rows=9))
    assert (report.reward, report.instruction) == (40, 60)
    assert (report.validation, report.test) == (7, 9)
    assert len(read_targets(recipe, "validation")) == 7
    with_none = recipe_of(reward_rows=0, validation_rows=0)
    report = make_splits(replace(with_none, work=with_none.work.parent / "none"))
    assert (report.reward, report.instruction, report.validation) == (0, 60, 0)


@pytest.mark.parametrize("eligible", ["all", "any_history", "both_histories"])
def test_who_may_be_a_target(recipe_of: Make, eligible: Any) -> None:
    recipe = recipe_of(eligible=eligible, reward_rows=4000, instruction_rows=6000)
    report = make_splits(recipe)
    source = review_source(recipe)
    cold = {review.key: is_cold(review, source) for review in source}
    fit = {
        "all": lambda _: True,
        "any_history": lambda sides: not all(sides),
        "both_histories": lambda sides: not any(sides),
    }[eligible]
    wanted = {key for key, sides in cold.items() if fit(sides)}
    found = {key for split in ("train", "validation", "test") for key in keys(recipe, split)}
    wordless = {r.key for r in source if not r.text.strip()}
    assert found <= wanted
    assert wanted - found <= wordless
    assert report.ineligible == len(cold) - len(wanted)
    assert report.ineligible > 0 or eligible == "all"


def test_the_seed_and_the_rows_decide_not_their_order(recipe_of: Make, tmp_path: Path) -> None:
    recipe = recipe_of(validation_rows=10)
    make_splits(recipe)
    drawn = {split: keys(recipe, split) for split in ("train", "validation", "test")}
    table = pq.read_table(recipe.folder("splits") / "train.parquet")

    shuffled = some_reviews()
    random.Random(5).shuffle(shuffled)
    again = replace(recipe_of(shuffled, validation_rows=10), work=tmp_path / "again")
    make_splits(again)
    assert {split: keys(again, split) for split in ("train", "validation", "test")} == drawn
    assert pq.read_table(again.folder("splits") / "train.parquet").equals(table)

    other = replace(again, seed=43, work=tmp_path / "other")
    make_splits(other)
    assert set(keys(other, "train", "reward")) != set(keys(again, "train", "reward"))
    assert set(keys(other, "validation")) != set(drawn["validation"])
    assert keys(other, "test") == drawn["test"]  # all of them


def test_further_rows_show_averages_alone(recipe_of: Make) -> None:
    before = recipe_of()
    make_splits(before)
    worded = keys(before, "train")
    recipe = replace(recipe_of(averages_rows=25), work=before.work.with_name("more"))
    report = make_splits(recipe)
    assert report.averages == 25
    assert keys(recipe, "train") == worded  # as if the others were not there
    numbers = set(keys(recipe, "train", "averages"))
    assert len(numbers) == 25
    assert not numbers & set(worded)
    with pytest.raises(SettingError, match="averages_rows=-1"):
        make_splits(recipe_of(averages_rows=-1))


def test_a_lot_is_a_beginning_of_a_larger_one() -> None:
    reviews = some_reviews(50)
    whole = by_lot(reviews, 1, "x")
    assert whole == by_lot(reversed(reviews), 1, "x")
    assert [r for r in whole if r in reviews[:20]] == by_lot(reviews[:20], 1, "x")
    assert whole != by_lot(reviews, 2, "x")
    assert whole != by_lot(reviews, 1, "y")


def test_the_files_and_their_manifest(recipe_of: Make) -> None:
    recipe = recipe_of()
    report = make_splits(recipe)
    assert report.folder == recipe.folder("splits")
    names = sorted(p.name for p in report.folder.iterdir() if not p.name.startswith("_"))
    assert names == ["manifest.json", "test.parquet", "train.parquet", "validation.parquet"]
    assert pq.read_schema(report.folder / "train.parquet").equals(SPLIT_SCHEMA)
    table = pandas.read_parquet(report.folder / "train.parquet")
    assert set(table.role) == {"reward", "instruction"}
    assert table.timestamp.is_monotonic_increasing
    assert set(pandas.read_parquet(report.folder / "test.parquet").role) == {"test"}
    known = {review.key: review for review in review_source(recipe)}
    assert all(known[review.key] == review for review in read_targets(recipe, "train"))
    manifest = json.loads((report.folder / "manifest.json").read_text())
    assert manifest["counts"] == {
        "reward": 40,
        "instruction": 60,
        "averages": 0,
        "validation": report.validation,
        "test": report.test,
    }
    assert manifest["made_of"]["seed"] == 42
    assert manifest["made_of"]["splits.reward_rows"] == 40
    assert len(manifest["made_of"]["reviews"]) == 32
    assert set(manifest["outputs"]) == {"train.parquet", "validation.parquet", "test.parquet"}
    assert manifest["times"]["train"][1] < manifest["boundaries"][""][0]


def test_made_once(recipe_of: Make) -> None:
    recipe = recipe_of()
    first = make_splits(recipe)
    stamps = {p: p.stat().st_mtime_ns for p in first.folder.glob("*.parquet")}
    again = make_splits(recipe)
    assert again == replace(first, reused=True)
    assert {p: p.stat().st_mtime_ns for p in first.folder.glob("*.parquet")} == stamps
    # Settings of other steps change nothing.
    assert make_splits(replace(recipe, history=3, device="cpu")).reused

    with pytest.raises(SettingError, match=r"different: seed\); choose another work folder"):
        make_splits(replace(recipe, seed=1))
    others = replace(recipe, splits=replace(recipe.splits, eligible="all", test_rows=3))
    with pytest.raises(SettingError, match=r"different: splits\.eligible, splits\.test_rows"):
        make_splits(others)
    recipe.reviews.write_text(recipe.reviews.read_text().replace("Words 7.", "Words seven."))
    with pytest.raises(SettingError, match="different: reviews"):
        make_splits(recipe)


def test_what_a_killed_run_left_is_made_again(recipe_of: Make) -> None:
    recipe = recipe_of()
    folder = make_splits(recipe).folder
    wanted = keys(recipe, "train")
    (folder / "manifest.json").unlink()
    (folder / "train.parquet").write_bytes(b"half")
    (folder / "_train.parquet").write_bytes(b"half")
    with pytest.raises(NotReadyError, match="run the step `splits` first"):
        read_targets(recipe, "train")
    assert not make_splits(recipe).reused
    assert keys(recipe, "train") == wanted
    (folder / "test.parquet").unlink()
    with pytest.raises(NotReadyError, match="splits"):
        read_targets(recipe, "test")
    assert not make_splits(recipe).reused
    assert keys(recipe, "test")


def test_edited_or_damaged_splits_are_refused(recipe_of: Make) -> None:
    recipe = recipe_of()
    folder = make_splits(recipe).folder
    with (folder / "train.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"train\.parquet was changed after it was made"):
        make_splits(recipe)
    with pytest.raises(DataError, match=r"train\.parquet cannot be read"):
        read_targets(recipe, "train")
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        make_splits(recipe)


def test_one_process_at_a_time(recipe_of: Make) -> None:
    recipe = recipe_of()
    with (
        open_folder(recipe.folder("splits")),
        pytest.raises(InputError, match="another process"),
    ):
        make_splits(recipe)


@pytest.mark.parametrize(
    ("reviews", "splits", "message"),
    [
        (some_reviews(3), {}, r"too few reviews to split by time: of 3, .* for test"),
        ([replace(r, timestamp=1.0) for r in some_reviews(50)], {"eligible": "all"}, "of 50"),
        (
            [Review(f"u{n}", f"i{n}", 3.0, float(n), "", "Words.") for n in range(100)],
            {},
            "0 of 80 for training, 0 of 10 for validation, 0 of 10 for test",
        ),
        (
            [replace(r, text="") for r in some_reviews()],
            {},
            r"too few reviews to train on: 0 \(with words\) for the reward model and 60",
        ),
    ],
    ids=["few", "one time", "all cold", "no words"],
)
def test_too_few_rows(
    recipe_of: Make, reviews: list[Review], splits: dict[str, Any], message: str
) -> None:
    recipe = recipe_of(reviews, **splits)
    with pytest.raises(DataError, match=message):
        make_splits(recipe)
    with pytest.raises(NotReadyError):
        read_targets(recipe, "train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SplitSettings(train=0.8, validation=0.3), "leave a share to test on"),
        (SplitSettings(train=0.0), "the first is above 0"),
        (SplitSettings(reward_rows=-1), r"splits\.reward_rows=-1"),
    ],
)
def test_bad_settings(recipe_of: Make, settings: SplitSettings, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        make_splits(replace(recipe_of(), splits=settings))


def test_a_part_with_no_share_is_empty(recipe_of: Make) -> None:
    report = make_splits(recipe := recipe_of(train=0.8, validation=0.0))
    assert report.validation == 0
    assert read_targets(recipe, "validation") == []
    validation_from, test_from = report.boundaries[""]
    assert validation_from == test_from


def test_unknown_parts(recipe_of: Make) -> None:
    make_splits(recipe := recipe_of())
    with pytest.raises(SettingError, match="no split 'valid': one of train, validation, test"):
        read_targets(recipe, "valid")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="no role 'reward' in the split test"):
        read_targets(recipe, "test", "reward")
