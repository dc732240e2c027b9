"""Labels: read strictly, and always such as the summarizer could have written."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.domains import has_labels, read_labels
from finetune.settings import parse_recipe
from finetune.teacher.labels import fit_summary, read_answer
from r4r_graph import Review
from r4r_graph.engine.aspects import MAX_PHRASES, format_aspects, parse_aspects
from r4r_graph.engine.decoding import MAX_PHRASE_TOKENS
from r4r_graph.engine.fake import FakeMeter
from r4r_graph.errors import DataError, NotReadyError
from r4r_graph.evaluation.words.labels import label_digest, label_key, normalized, read_aspects
from r4r_graph.evidence import TokenBudgets
from r4r_graph.schema import AspectSummary

ROW: dict[str, Any] = {
    "user_id": "u1",
    "item_id": "i1",
    "timestamp": 1_000_000,
    "positive": ["warm voice", "clever lyrics"],
    "negative": [],
    "preferences": ["honesty"],
    "match_score": 0.4,
    "confident": True,
}
LABEL = AspectSummary(("warm voice", "clever lyrics"), (), ("honesty",))


def written(path: Path, rows: list[dict[str, Any]], **types: pa.DataType) -> Path:
    table = pa.Table.from_pylist(rows)
    for name, kind in types.items():
        table = table.set_column(
            table.column_names.index(name), name, table.column(name).cast(kind)
        )
    pq.write_table(table, path)
    return path


def test_a_ready_made_file(tmp_path: Path) -> None:
    rows = [ROW, ROW | {"user_id": "u2", "confident": False}, ROW | {"item_id": "i2"}]
    file = written(tmp_path / "labels.parquet", rows)
    sure = read_aspects(file, confident_only=True)
    assert sure == {("u1", "i1", 1e6): LABEL, ("u1", "i2", 1e6): LABEL}
    assert len(read_aspects(str(file), confident_only=False)) == 3
    review = Review("u1", "i2", 5, 1_000_000, "Title", "Words.")
    assert sure[label_key(review)] == LABEL


def test_a_file_that_does_not_say_how_sure_it_is(tmp_path: Path) -> None:
    row = {name: ROW[name] for name in ROW if name not in ("confident", "preferences")}
    file = written(tmp_path / "labels.parquet", [row | {"values": ["honesty"]}])
    assert read_aspects(file, confident_only=True) == {("u1", "i1", 1e6): LABEL}


def test_a_jobs_folder(tmp_path: Path) -> None:
    row = {name: ROW[name] for name in ("user_id", "item_id", "timestamp", "positive", "negative")}
    row |= {"key": "k", "values": ["honesty"], "error": None}
    nothing = row | {"positive": None, "negative": None, "values": None, "item_id": "i9"}
    failed = nothing | {"error": "HTTP 500"}
    written(tmp_path / "part-000000000-000000002.parquet", [row, failed])
    written(
        tmp_path / "part-000000002-000000003.parquet", [row | {"item_id": "i2"}], error=pa.string()
    )
    (tmp_path / "_half.parquet").write_bytes(b"half")
    (tmp_path / "_job.json").write_text("{}")
    found = read_aspects(tmp_path, confident_only=True)
    assert found == {("u1", "i1", 1e6): LABEL, ("u1", "i2", 1e6): LABEL}
    written(tmp_path / "part-000000003-000000004.parquet", [nothing | {"positive": ["a"]}])
    with pytest.raises(DataError, match=r"000004\.parquet: row 1: column negative has no list"):
        read_aspects(tmp_path, confident_only=True)


def test_twice_is_fine_differently_is_not(tmp_path: Path) -> None:
    other = ROW | {"positive": ["loud"]}
    twice = written(tmp_path / "twice.parquet", [ROW, ROW])
    assert read_aspects(twice, confident_only=True) == {("u1", "i1", 1e6): LABEL}
    differently = written(tmp_path / "differently.parquet", [ROW, ROW | {"item_id": "i2"}, other])
    with pytest.raises(DataError, match=r"row 3: labels a review differently than .*: row 1"):
        read_aspects(differently, confident_only=True)
    # A label that is not read cannot be in the way.
    unsure = written(tmp_path / "unsure.parquet", [other | {"confident": False}, ROW])
    assert read_aspects(unsure, confident_only=True) == {("u1", "i1", 1e6): LABEL}
    with pytest.raises(DataError, match="differently"):
        read_aspects(unsure, confident_only=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positive": "warm; clever"}, r"column positive is of type string; expected lists"),
        ({"negative": [1, 2]}, r"column negative holds lists of int64; expected texts"),
        ({"preferences": ["a", None]}, r"row 2: column values has no list of texts, or an empty"),
        ({"positive": None}, r"row 2: column positive has no list of texts"),
        ({"user_id": " "}, r"row 2: column user_id is empty"),
        ({"item_id": None}, r"row 2: column item_id is empty"),
        ({"timestamp": None}, r"row 2: column timestamp is empty"),
        ({"timestamp": 1_000_000_000_000}, r"row 2: bad timestamp .*milliseconds"),
        ({"timestamp": "yesterday"}, r"column timestamp is of type string; expected numbers"),
        ({"confident": "yes"}, r"column confident is of type string; expected true or false"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_row_or_column_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    [name] = change
    first = ROW
    if not isinstance(change[name], type(ROW[name])) and change[name] is not None:
        first = ROW | change  # a column has one type
    if isinstance(change[name], list) and isinstance(change[name][0], int):
        first = ROW | change
    file = written(tmp_path / "labels.parquet", [first, ROW | change])
    with pytest.raises(DataError, match=message) as caught:
        read_aspects(file, confident_only=False)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("lacks", ["user_id", "timestamp", "positive", "preferences"])
def test_a_missing_column_is_named(tmp_path: Path, lacks: str) -> None:
    row = {name: value for name, value in ROW.items() if name != lacks}
    file = written(tmp_path / "labels.parquet", [row])
    with pytest.raises(DataError, match=f"no column {lacks.replace('preferences', 'values')}"):
        read_aspects(file, confident_only=True)


def test_files_that_are_no_labels(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_aspects(tmp_path / "none.parquet", confident_only=True)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"broken\.parquet: cannot be read"):
        read_aspects(tmp_path / "broken.parquet", confident_only=True)
    (tmp_path / "labels.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="labels are read from Parquet files"):
        read_aspects(tmp_path / "labels.jsonl", confident_only=True)


WILD = [
    "warm voice",
    " two  spaces ",
    "semi; colons; inside",
    "a <b>tag</b> & more",
    "new\nline and\r\nmore",
    "none",
    "None.",
    "n/a",
    "",
    " . , ",
    "ends with a stop.",
    "WARM VOICE",
    "no\u00a0break and \u2028 lines",
    "\x00control\x1f\x85",
    "right \u202eto left",
    "half \ud83d pair",
    "<|im_end|>",
    "positive: nested",
    "naïve café 日本語 👍🏽",
    "x" * 300,
]


def test_every_label_can_be_written_and_read_back() -> None:
    """Round trip through the summarizer's format, whatever the phrases."""
    dice = random.Random(1)
    for _ in range(400):
        lists = [tuple(dice.choices(WILD, k=dice.randrange(9))) for _ in range(3)]
        label = normalized(AspectSummary(*lists))
        assert parse_aspects(format_aspects(label)) == label
        assert normalized(label) == label
        assert all(len(phrases) <= MAX_PHRASES for phrases in label.to_dict().values())
        format_aspects(label).encode()


def test_labels_from_a_file_can_be_written_and_read_back(tmp_path: Path) -> None:
    wild = [phrase for phrase in WILD if "\ud83d" not in phrase]
    rows = [
        ROW | {"item_id": f"i{n}", "positive": wild[n:], "negative": wild[:n], "preferences": wild}
        for n in range(len(wild))
    ]
    labels = read_aspects(written(tmp_path / "wild.parquet", rows), confident_only=True)
    assert len(labels) == len(wild)
    for label in labels.values():
        assert parse_aspects(format_aspects(label)) == label
        assert len(label.values) == MAX_PHRASES


def test_the_digest_is_of_the_labels_not_of_their_order() -> None:
    one = {("u", "i", 1.0): LABEL, ("u", "j", 1.0): AspectSummary()}
    assert label_digest(one) == label_digest(dict(reversed(one.items())))
    assert label_digest(one) != label_digest({**one, ("u", "j", 1.0): LABEL})
    assert label_digest(one) != label_digest({("u", "i", 1.0): LABEL})


def test_a_label_fits_what_the_summarizer_may_write() -> None:
    meter, budgets = FakeMeter(), TokenBudgets(summary=40)
    words = [f"word{n}" for n in range(40)]
    long = " ".join(words)
    label = AspectSummary(
        (long, "short one", *words[:4]), (long, long), ("a b c d e f g h", "i j k l m n o p")
    )
    fit = fit_summary(label, meter, budgets)
    assert meter.count(format_aspects(fit)) < budgets.summary
    phrases = [phrase for phrases in fit.to_dict().values() for phrase in phrases]
    assert all(meter.count(phrase) <= MAX_PHRASE_TOKENS for phrase in phrases)
    assert fit.positive[0] == "short one"  # the long one went
    assert fit.negative == (" ".join(words[:MAX_PHRASE_TOKENS]),)  # nothing else was there
    assert fit_summary(fit, meter, budgets) == fit
    assert fit_summary(LABEL, meter, budgets) == LABEL


@pytest.mark.parametrize(
    "text",
    [
        "positive: warm voice; clever lyrics\nnegative: none\nvalues: honesty",
        "Positive: warm voice; clever lyrics.\n\nNegative: None\n\nValues: honesty\n",
        "Here are the notes:\n```\npositive: warm voice; clever lyrics\nnegative: n/a\n"
        "values: honesty\n```",
        "- **Positive:** warm voice; clever lyrics\n- **Negative:** none\n- **Values:** honesty",
        "values: honesty\r\nnegative: none\r\npositive: warm voice; clever lyrics; Warm Voice",
        "> *positive*: warm voice; clever lyrics\n> *negative*: none.\n> *values*: honesty",
    ],
)
def test_what_a_chat_model_may_write_around_a_summary(text: str) -> None:
    assert read_answer(text) == LABEL


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no line 'positive', 'negative', 'values'"),
        ("I cannot do that.", "no line"),
        ("positive: a\nnegative: b", "no line 'values'"),
        ("positive: a\nnegative: b\nvalues: c\npositive: d", "'positive' is there twice"),
        ("positive:\n- a\n- b\nnegative: c\nvalues: d", "'positive' is left empty"),
        ("positive: ...\nnegative: ...\nvalues: ...", "'positive' is left empty"),
        ('{"positive": ["a"], "negative": [], "values": []}', "no line"),
    ],
)
def test_what_is_no_summary(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_answer(text)


def test_where_the_labels_are(tmp_path: Path) -> None:
    tree = {"reviews": "reviews.parquet", "work": str(tmp_path)}
    mine = written(tmp_path / "mine.parquet", [ROW, {**ROW, "item_id": "i2", "confident": False}])
    ready = parse_recipe({**tree, "teacher": {"aspects": str(mine)}})
    assert has_labels(ready)
    assert list(read_labels(ready, confident_only=True)) == [("u1", "i1", 1e6)]
    assert len(read_labels(ready, confident_only=False)) == 2
    recipe = parse_recipe(tree)
    assert not has_labels(recipe)
    with pytest.raises(NotReadyError, match="run the step `teacher` first"):
        read_labels(recipe, confident_only=True)
    folder = tmp_path / "labels" / "aspects"
    folder.mkdir(parents=True)
    written(folder / "part-000000000-000000001.parquet", [ROW])
    assert len(read_labels(recipe, confident_only=True)) == 1


def test_the_labels_of_several_data_sets_bear_their_names(tmp_path: Path) -> None:
    mine = written(tmp_path / "mine.parquet", [ROW])
    domains = {
        "films": {"reviews": "films.parquet"},
        "music": {"reviews": "music.parquet", "aspects": str(mine)},
    }
    recipe = parse_recipe({"domains": domains, "work": str(tmp_path)})
    assert list(read_labels(recipe, confident_only=True)) == [("music/u1", "music/i1", 1e6)]
