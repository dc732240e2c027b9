"""Ready-made candidates: screened, ranked by their error within a row, the best of them kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.rejection.candidates import rank_candidates
from finetune.rejection.kept import KEPT_SCHEMA, read_kept
from finetune.rejection.sampling import reject
from finetune.settings import Recipe, parse_recipe
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.engine.fake import FakeMeter
from r4r_graph.errors import DataError, SettingError
from r4r_graph.experts import reasoner_prompt
from r4r_graph.jobs import JobProgress

METER = FakeMeter()


def text(word: str) -> str:
    return f"They praise {word} songs again and again, and this record is full of them."


def history(*titles: str) -> list[dict[str, Any]]:
    return [
        {"title": t, "positive": [f"good {t}"], "negative": [], "preferences": [f"more {t}"]}
        for t in titles
    ]


def row(*candidates: tuple[str | None, float | None], title: str = "Album A") -> dict[str, Any]:
    return {
        "item_title": title,
        "user_history": history("one", "two", "three"),
        "item_history": history(title),
        "candidates": [{"text": words, "error": error} for words, error in candidates],
    }


def recipe_of(folder: Path, base: Path, *rows: dict[str, Any], **settings: Any) -> Recipe:
    file = folder / "candidates.parquet"
    pq.write_table(pa.Table.from_pylist(list(rows)), file)
    return parse_recipe(
        {
            "work": str(folder / "work"),
            "base": str(base),
            "history": settings.pop("history", 10),
            "seed": settings.pop("seed", 42),
            "budgets": settings.pop("budgets", {}),
            "teacher": {"rationales": str(file)},
            "rejection": settings,
        }
    )


def texts(recipe: Recipe) -> list[str]:
    return [kept["rationale"] for kept in read_kept(recipe)]


def test_the_lowest_error_wins_in_each_row(tmp_path: Path, tiny_base: Path) -> None:
    recipe = recipe_of(
        tmp_path,
        tiny_base,
        row((text("slow"), 0.5), (text("sad"), 0.2), (text("quiet"), 0.9)),
        row((text("loud"), 1.5), (text("fast"), 1.1)),
    )
    report = rank_candidates(recipe, METER)
    assert texts(recipe) == [text("sad"), text("fast")]
    assert (report.rows, report.kept, report.without, report.failed) == (2, 2, 0, 0)
    assert (report.plain.drawn, report.plain.judged, report.plain.kept) == (5, 5, 2)
    assert report.kept_error == pytest.approx((0.2 + 1.1) / 2)
    assert report.baseline_error == pytest.approx((0.5 + 1.3) / 2)
    assert report.ready_made


def test_leaks_and_faults_never_win(tmp_path: Path, tiny_base: Path) -> None:
    recipe = recipe_of(
        tmp_path,
        tiny_base,
        row(
            (text("slow") + " The user has rated the item 5 stars.", 0.0),
            (text("slow") + "\n\n| 7 | 8 |", 0.0),
            ("", 0.0),
            (None, 0.0),
            (text("old")[:-1], 0.0),
            (text("loud"), None),
            (text("fast"), math.nan),
            (text("sad"), 0.4),
            (text("sad").replace("songs ", "songs  "), 0.3),
        ),
    )
    report = rank_candidates(recipe, METER)
    assert texts(recipe) == [text("sad")]
    counts = report.plain
    assert (counts.drawn, counts.leaked, counts.malformed) == (9, 1, 6)
    assert (counts.repeated, counts.judged, counts.kept) == (1, 1, 1)
    assert report.reasons["malformed: empty"] == 2
    assert report.reasons["malformed: no error"] == 2


def test_ties_go_to_the_shorter_then_the_earlier(tmp_path: Path, tiny_base: Path) -> None:
    recipe = recipe_of(
        tmp_path,
        tiny_base,
        row((text("very slow"), 0.2), (text("sad"), 0.2), (text("old"), 0.2)),
    )
    rank_candidates(recipe, METER)
    assert texts(recipe) == [text("sad")]


def test_several_are_kept_the_best_first(tmp_path: Path, tiny_base: Path) -> None:
    recipe = recipe_of(
        tmp_path,
        tiny_base,
        row(*((text(word), error) for word, error in zip("abcde", (5, 3, 1, 2, 4), strict=True))),
        keep=2,
    )
    rank_candidates(recipe, METER)
    kept = read_kept(recipe)
    assert [(k["rationale"], k["error"], k["rank"]) for k in kept] == [
        (text("c"), 1.0, 0),
        (text("d"), 2.0, 1),
    ]


def test_the_margin_is_against_the_median_of_the_sound_ones(
    tmp_path: Path, tiny_base: Path
) -> None:
    clear = row((text("a"), 0.1), (text("b"), 0.5), (text("c"), 0.6), ("Leaks 5 stars.", 0.0))
    unclear = row((text("a"), 0.4), (text("b"), 0.5), (text("c"), 0.6), ("Leaks 5 stars.", 9.0))
    alone = row((text("a"), 0.0))
    recipe = recipe_of(tmp_path, tiny_base, clear, unclear, alone, min_margin=0.2, keep=3)
    report = rank_candidates(recipe, METER)
    assert [(k["error"], k["rank"]) for k in read_kept(recipe)] == [(0.1, 0)]
    assert (report.kept, report.without) == (1, 2)


def test_what_the_reasoner_is_shown(tmp_path: Path, tiny_base: Path) -> None:
    recipe = recipe_of(tmp_path, tiny_base, row((text("slow"), 0.1), title="Best <of>"), history=2)
    rank_candidates(recipe, METER)
    (kept,) = read_kept(recipe)
    assert (kept["user_id"], kept["item_id"], kept["as_of"]) == (None, None, None)
    assert (kept["baseline_error"], kept["hinted"]) == (None, False)
    context = reasoner_prompt(kept["evidence"], METER)[1].content
    assert "Best ‹of›" in context
    assert '1. "two"; liked: good two; wants: more two' in context  # the latest two
    assert '2. "three"; liked: good three; wants: more three' in context
    assert "good one" not in context
    assert "1. liked: good Best ‹of›; wants: more Best ‹of›" in context
    assert "rated" not in context


def test_the_history_fits_its_budget(tmp_path: Path, tiny_base: Path) -> None:
    long = row((text("slow"), 0.1))
    long["user_history"] = history(*(f"title {n} " * 8 for n in range(9)))
    recipe = recipe_of(tmp_path, tiny_base, long, budgets={"side": 64})
    rank_candidates(recipe, METER)
    (kept,) = read_kept(recipe)
    assert 0 < len(kept["evidence"].user_reviews) < 9
    assert kept["evidence"].user_reviews[-1].title.startswith("title 8")


def test_a_text_has_to_fit_the_budget_of_a_rationale(tmp_path: Path, tiny_base: Path) -> None:
    size = METER.count(text("slow"))
    recipe = recipe_of(tmp_path, tiny_base, row((text("slow"), 0.1)), budgets={"rationale": size})
    report = rank_candidates(recipe, METER)
    assert report.reasons == {"malformed: too long": 1}
    assert texts(recipe) == []


def test_titles_may_hold_numbers(tmp_path: Path, tiny_base: Path) -> None:
    words = 'The person praises such hooks, so "100% Soul" will suit them well.'
    recipe = recipe_of(tmp_path, tiny_base, row((words, 0.1), title="100% Soul"), row((words, 0.1)))
    report = rank_candidates(recipe, METER)
    assert report.plain.leaked == report.kept == 1


def test_rows_are_capped_by_seed(tmp_path: Path, tiny_base: Path) -> None:
    rows = [row((text(f"word{n}"), 0.1)) for n in range(30)]
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        folder = tmp_path / name
        folder.mkdir()
        recipe = recipe_of(folder, tiny_base, *rows, rows=5, seed=seed)
        assert rank_candidates(recipe, METER).rows == 5
        found.append(texts(recipe))
    assert found[0] == found[1] != found[2]


def test_it_is_done_once(tmp_path: Path, tiny_base: Path) -> None:
    recipe = recipe_of(tmp_path, tiny_base, row((text("slow"), 0.1)))
    seen: list[JobProgress] = []
    first = rank_candidates(recipe, METER, seen.append)
    again = rank_candidates(recipe, METER, seen.append)
    assert len(seen) == 1
    assert again == first
    other = recipe_of(tmp_path, tiny_base, row((text("sad"), 0.1)))
    rank_candidates(other, METER, seen.append)
    assert len(seen) == 2
    assert texts(other) == [text("sad")]


def test_reject_ranks_where_candidates_are_given(
    tmp_path: Path, tiny_base: Path, fake: Callable[..., BatchingEngine]
) -> None:
    recipe = recipe_of(tmp_path, tiny_base, row((text("slow"), 0.1)))
    assert reject(recipe).ready_made  # with the base model's tokenizer, and no reward model
    assert texts(recipe) == [text("slow")]
    facts = json.loads((recipe.folder("rejection") / "report.json").read_text())
    assert facts["ready_made"] is True
    table = pd.read_parquet(recipe.folder("rejection") / "kept.parquet")
    assert list(table.columns) == KEPT_SCHEMA.names


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"candidates": ["a", "b"]}, "list of {text, error}"),
        ({"item_title": ["a", "b"], "candidates": None}, "list of {text, error}"),
        ({"user_history": [{"title": "a"}]}, "bad history"),
    ],
)
def test_a_bad_file_is_named(
    tmp_path: Path, tiny_base: Path, bad: dict[str, Any], says: str
) -> None:
    recipe = recipe_of(tmp_path, tiny_base, {**row((text("slow"), 0.1)), **bad})
    with pytest.raises(DataError, match=says) as caught:
        rank_candidates(recipe, METER)
    assert "candidates.parquet" in str(caught.value)


def test_a_missing_file_or_column_is_named(tmp_path: Path, tiny_base: Path) -> None:
    recipe = recipe_of(tmp_path, tiny_base, {"item_title": "a"})
    with pytest.raises(DataError, match="no column user_history"):
        rank_candidates(recipe, METER)
    Path(str(recipe.teacher.rationales)).unlink()
    with pytest.raises(DataError, match="cannot be read"):
        rank_candidates(recipe, METER)
    with pytest.raises(SettingError, match=r"teacher\.rationales"):
        rank_candidates(parse_recipe({"work": str(tmp_path)}), METER)
