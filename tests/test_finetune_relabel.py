"""Our own summaries mended into labels: what stands in the review, on its right side."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.domains import read_labels
from finetune.relabel import SCHEMA, Sides, fit_sides, mend, relabel
from finetune.settings import Recipe, parse_recipe
from finetune.splits import make_splits, training_ends
from finetune.summaries import make_summaries
from r4r_graph.engine.aspects import format_aspects
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.errors import DataError, NotReadyError, SettingError
from r4r_graph.evaluation.words.labels import read_aspects
from r4r_graph.schema import AspectSummary, Review
from tests.scripted import at, prompt, review

Fake = Callable[..., BatchingEngine]
GOOD, BAD = ("lovely", "gripping", "tender"), ("tedious", "clumsy", "shrill")
THINGS = ("score", "plot", "cast", "ending", "camera")


def rows(many: int = 400, seed: int = 0) -> list[dict[str, Any]]:
    """Reviews whose good words raise the rating and whose bad ones lower it."""
    dice = random.Random(seed)
    found = []
    for n in range(many):
        words = [dice.choice((GOOD, BAD)) for _ in range(3)]
        rating = 3 + sum(1 if kind is GOOD else -1 for kind in words) * 0.6
        said = " and a ".join(f"{dice.choice(kind)} {dice.choice(THINGS)}" for kind in words)
        found.append(
            {
                "user_id": f"u{n % 20}",
                "item_id": f"i{n % 23}",
                "title": "Film",
                "rating": rating,
                "timestamp": at(n),
                "review": f"It has a {said}.",
            }
        )
    return found


@pytest.fixture(scope="module")
def sides() -> Sides:
    return fit_sides([of(row["review"], row["rating"]) for row in rows()])


def of(text: str, rating: float = 3.0) -> Review:
    return review("ann", "film", 1, rating, text)


def test_words_are_known_by_what_they_do_to_ratings(sides: Sides) -> None:
    lovely, tedious, unknown = sides.slant(["lovely score", "tedious plot", "azure"])
    assert lovely > 0.3
    assert tedious < -0.3
    assert abs(unknown) < 0.05
    assert sides.slant([]) == []


def test_phrases_go_to_their_side(sides: Sides) -> None:
    wrong = AspectSummary(("Tedious plot", "Lovely score"), ("Tender cast",))
    found = mend(wrong, of("A tedious plot, a lovely score, a tender cast."), sides)
    assert found.summary == AspectSummary(("Lovely score", "Tender cast"), ("Tedious plot",))
    assert (found.phrases, found.kept, found.moved) == (3, 3, 2)


def test_where_a_phrase_says_little_the_rating_decides(sides: Sides) -> None:
    summary = AspectSummary(("Azure light",))
    for rating, side in ((4.8, "positive"), (1.2, "negative")):
        found = mend(summary, of("All of it in azure light.", rating), sides).summary
        assert found.to_dict()[side] == ["Azure light"]
    # But strong words hold against it.
    strong = mend(AspectSummary((), ("Lovely score",)), of("A lovely score.", 1.2), sides)
    assert strong.summary.positive == ("Lovely score",)


def test_what_does_not_stand_in_the_review_goes(sides: Sides) -> None:
    summary = AspectSummary(
        ("Lovely score", "Value for money", "Score of the"),
        ("Weak dialogue",),
        ("Emotional depth", "Loveliness", "Tedious plots"),
    )
    found = mend(summary, of("A lovely score of the old kind, a tedious plot."), sides).summary
    assert found == AspectSummary(("Lovely score",), (), ("Loveliness",))
    nothing = mend(AspectSummary(("Value for money",)), of("Lovely."), sides)
    assert not nothing.worth


def test_what_is_lacking_is_looked_for(sides: Sides) -> None:
    summary = AspectSummary(("Lack of depth",), ("No tedious plot",))
    found = mend(summary, of("A lack of depth.", 1.5), sides).summary
    assert found.negative == ("Lack of depth",)
    assert found.values == ("Depth",)


def two_sets(folder: Path, many: int = 400) -> Recipe:
    films, music = folder / "films.parquet", folder / "music.parquet"
    pq.write_table(pa.Table.from_pylist(rows(many)), films)
    pq.write_table(pa.Table.from_pylist(rows(60, seed=1)), music)
    known = rows(1, seed=1)[0]
    labels = folder / "aspects.parquet"
    label = {name: known[name] for name in ("user_id", "item_id", "timestamp")} | {
        "positive": ["Warm"],
        "negative": ["Cold"],
        "values": ["Warmth"],
    }
    pq.write_table(pa.Table.from_pylist([label]), labels)
    return parse_recipe(
        {
            "domains": {
                "films": {"reviews": str(films)},
                "music": {"reviews": str(music), "aspects": str(labels)},
            },
            "work": str(folder / "work"),
            "splits": {"reward_rows": 0, "instruction_rows": 60},
        }
    )


def test_the_step_labels_the_set_that_has_no_teacher(tmp_path: Path, fake: Fake) -> None:
    recipe = two_sets(tmp_path)
    with pytest.raises(NotReadyError, match="step `summaries`"):
        relabel(recipe)
    make_splits(recipe)

    def wrote(request: Any) -> str:
        """All words on the side of praise, and one that is not there."""
        said = prompt(request).split("It has a ")[1].split(".")[0].split(" and a ")
        return format_aspects(AspectSummary((*said[:3], "Value for money")))

    make_summaries(recipe, fake(write=wrote, adapters=("summarizer",)))
    report = relabel(recipe)
    assert [file.name for file in report.folder.iterdir()] == ["films.parquet"]
    table = pd.read_parquet(report.folder / "films.parquet")
    assert list(table.columns) == SCHEMA.names
    assert len(table) == report.labels > 50
    assert report.reviews >= report.labels
    assert 0 < report.moved < report.kept < report.phrases
    right = [
        all(phrase.split()[0].lower() in kind for phrase in phrases)
        for row in table.itertuples()
        for kind, phrases in ((GOOD, row.positive), (BAD, row.negative))
    ]
    assert sum(right) > 0.95 * len(right)
    assert not table.user_id.str.contains("/").any()
    assert table.timestamp.max() < training_ends(recipe)["films"]
    # And it is what a recipe takes as labels.
    second = parse_recipe(
        {
            "domains": {
                "films": {
                    "reviews": str(tmp_path / "films.parquet"),
                    "aspects": str(report.folder / "films.parquet"),
                }
            },
            "work": str(tmp_path / "second"),
        }
    )
    labels = read_labels(second, confident_only=True)
    assert (
        len(labels)
        == report.labels
        == len(read_aspects(report.folder / "films.parquet", confident_only=True))
    )
    make_splits(second)
    with pytest.raises(SettingError, match="every data set has labels"):
        relabel_with_summaries(second, fake(write=wrote, adapters=("summarizer",)))


def relabel_with_summaries(recipe: Recipe, engine: BatchingEngine) -> None:
    make_summaries(recipe, engine)
    relabel(recipe)


def test_ids_of_a_set_alone_stay_as_they_are(tmp_path: Path, fake: Fake) -> None:
    odd = [{**row, "user_id": f"a/{row['user_id']}"} for row in rows()]
    file = tmp_path / "reviews.parquet"
    pq.write_table(pa.Table.from_pylist(odd), file)
    recipe = parse_recipe(
        {
            "reviews": str(file),
            "work": str(tmp_path / "work"),
            "splits": {"reward_rows": 0, "instruction_rows": 20},
        }
    )
    make_splits(recipe)
    summary = format_aspects(AspectSummary(tuple(f"{w} {t}" for w in GOOD[:1] for t in THINGS)))
    make_summaries(recipe, fake(write=lambda _: summary, adapters=("summarizer",)))
    report = relabel(recipe)
    users = set(pd.read_parquet(report.folder / "reviews.parquet").user_id)
    assert users <= {row["user_id"] for row in odd}


def test_too_little_to_learn_from() -> None:
    few = [of(f"Lovely {n}", n % 5 + 1) for n in range(20)]
    with pytest.raises(DataError, match="20 reviews with words are too few"):
        fit_sides(few)
    with pytest.raises(DataError, match="one rating"):
        fit_sides([of("Lovely.", 4) for _ in range(300)])
