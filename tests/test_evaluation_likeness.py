"""Likeness of texts: the floor by hand, embeddings, BLEURT; never the network."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r4r_graph.errors import (
    DataError,
    MissingExtraError,
    ModelError,
    ModelNotFoundError,
    SettingError,
)
from r4r_graph.evaluation.words.likeness import (
    PACKAGED,
    bleurt,
    embedding_similarity,
    other_rows,
    score_summaries,
    score_texts,
)
from r4r_graph.schema import AspectSummary

needs_minilm = pytest.mark.skipif(
    find_spec(PACKAGED) is None or find_spec("sentence_transformers") is None,
    reason="the extra `similarity` is not installed",
)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


class Shared:
    """Share of a text's words that are in the reference; fails where the text says so."""

    name = "shared"

    def __init__(self, broken: float | None = None) -> None:
        self.asked: list[tuple[str, str]] = []
        self.broken = broken

    def score(self, texts: Sequence[str], references: Sequence[str]) -> list[float | None]:
        self.asked += zip(texts, references, strict=True)
        return [
            self.broken
            if "fail" in text
            else len({*text.split()} & {*reference.split()}) / len({*text.split()})
            for text, reference in zip(texts, references, strict=True)
        ]


# Figures over rows ------------------------------------------------------------------------------


def test_the_other_row_differs_and_is_drawn_by_the_seed() -> None:
    references = [f"review {at // 3}" for at in range(30)]  # three rows a text
    for seed in range(20):
        others = other_rows(references, seed)
        assert others is not None
        assert all(references[at] != references[other] for at, other in enumerate(others))
    assert other_rows(references, 0) == other_rows(references, 0) != other_rows(references, 1)
    distinct = other_rows(list(range(30)), 0)
    assert distinct is not None
    assert sorted(distinct) == list(range(30))  # where all differ, everyone's is held once
    assert other_rows(["a", "b"], 0) == [1, 0]
    lone = other_rows(["a", "a", "b", "a"], 0)
    assert lone is not None
    assert [lone[0], lone[1], lone[3]] == [2, 2, 2]


@pytest.mark.parametrize("references", [[], ["a"], ["a", "a", "a"]])
def test_without_another_row_there_is_no_floor(references: list[str]) -> None:
    assert other_rows(references, 0) is None
    assert score_texts(Shared(), references, references) is None


def test_own_other_and_difference_by_hand() -> None:
    texts = ["a b", "c d", "e f", "g x"]
    references = ["a b", "c z", "e f", "y z"]  # shares 1, 1/2, 1, 0; none with another row's
    scorer = Shared()
    found = score_texts(scorer, texts, references)
    assert found is not None
    assert (found.name, found.rows, found.failed) == ("shared", 4, 0)
    assert found.value.value == pytest.approx(2.5 / 4)
    assert found.floor.value == 0.0
    assert found.difference.value == pytest.approx(2.5 / 4)
    assert found.difference.low <= found.difference.value <= found.difference.high
    assert len(scorer.asked) == 8
    assert found == score_texts(Shared(), texts, references)


def test_texts_that_know_nothing_of_their_row_do_not_pass() -> None:
    dice = np.random.default_rng(0)
    texts = [f"word{dice.integers(9)} word{dice.integers(9)}" for _ in range(300)]
    references = [" ".join(f"word{dice.integers(9)}" for _ in range(4)) for _ in range(300)]
    found = score_texts(Shared(), texts, references)
    assert found is not None
    assert found.value.value > 0.3
    assert not found.difference.excludes_zero


def test_rows_without_words_are_not_rows() -> None:
    texts = ["a", None, " ", "b", "c"]
    references = ["a", "b", "c", None, " c "]
    scorer = Shared()
    found = score_texts(scorer, texts, references)
    assert found is not None
    assert found.rows == 2
    assert scorer.asked == [("a", "a"), ("c", "c"), ("a", "c"), ("c", "a")]
    assert score_texts(Shared(), texts[:4], references[:4]) is None


@pytest.mark.parametrize("broken", [None, float("nan"), float("inf")])
def test_a_row_that_fails_is_counted_and_left_out(broken: float | None) -> None:
    texts = ["a", "b", "c fail", "d"]
    found = score_texts(Shared(broken), texts, ["a", "b", "c", "z"])
    assert found is not None
    assert (found.rows, found.failed) == (4, 1)
    assert found.value.value == pytest.approx(2 / 3)


def test_a_scorer_that_fails_on_all_rows_has_no_figures() -> None:
    found = score_texts(Shared(), ["fail"] * 3, ["a", "b", "c"])
    assert found is not None
    assert (found.rows, found.failed) == (3, 3)
    assert np.isnan([found.value.value, found.floor.value, found.difference.value]).all()
    assert not found.difference.excludes_zero
    one = score_texts(Shared(), ["a", "fail", "fail"], ["a", "b", "c"])
    assert one is not None
    assert (one.failed, one.difference.excludes_zero) == (2, False)  # one row is no evidence


def test_unequal_rows() -> None:
    with pytest.raises(DataError, match="1 texts, 2 references"):
        score_texts(Shared(), ["a"], ["a", "b"])
    with pytest.raises(DataError, match="1 summaries and 0 of the teacher's"):
        score_summaries([None], [])


def test_summaries_by_hand() -> None:
    teacher = [AspectSummary((word,), ("none of it",), ()) for word in ("voice", "drums", "words")]
    made = [teacher[0], None, AspectSummary((), ("none of it",), ())]
    found = score_summaries(made, teacher)
    assert found is not None
    assert (found.name, found.rows, found.failed) == ("phrase overlap", 3, 0)
    # values: 1, 0 (not made), 2/3 (one list of three is missed)
    assert found.value.value == pytest.approx((1 + 0 + 2 / 3) / 3)
    # against another row's: two lists of three agree wherever there is a summary
    assert found.floor.value == pytest.approx((2 / 3 + 0 + 2 / 3) / 3)
    assert found.difference.value == pytest.approx(1 / 9)
    assert score_summaries(made[:1], teacher[:1]) is None
    assert score_summaries([None, None], [teacher[0]] * 2) is None


# Embeddings -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm() -> Any:
    return embedding_similarity(device="cpu")


@needs_minilm
def test_similarity_against_sentence_transformers(minilm: Any) -> None:
    from sentence_transformers import util

    texts = ["The voice is warm.", "The drums are too loud."]
    references = ["A warm voice!", "The parcel came late."]
    own = minilm.model.encode(texts, show_progress_bar=False)
    other = minilm.model.encode(references, show_progress_bar=False)
    wanted = util.pairwise_cos_sim(own, other).tolist()
    assert minilm.score(texts, references) == pytest.approx(wanted, abs=1e-5)
    assert wanted[0] > wanted[1] + 0.3
    assert minilm.score(texts, texts) == pytest.approx([1.0, 1.0])
    assert minilm.score([], []) == []
    assert minilm.name == "similarity"


@needs_minilm
def test_the_end_of_a_long_text_counts(minilm: Any) -> None:
    start = "The parcel came late and the box was torn. " * 60
    long = start + "The singer has a warm voice. " * 60
    pieces = minilm._pieces(long)
    assert " ".join(pieces) == " ".join(long.split())
    lengths = [len(piece.split()) for piece in pieces]
    assert max(lengths) - min(lengths) <= 1
    assert 200 < max(map(minilm._tokens, pieces)) <= minilm.model.max_seq_length == 256
    assert minilm._pieces("short") == ["short"]
    assert len(minilm._pieces("x" * 5000)) == 1  # one word: the model cuts it
    giant = minilm._pieces("warm " * 200 + "http://x.example/?" + "a-" * 900)
    assert 1 < len(giant) < 20
    asked = "The singer has a warm voice."
    cut, whole = minilm.score([asked, asked], [start, long])
    assert whole > cut + 0.2


@needs_minilm
def test_own_texts_are_told_from_others(minilm: Any) -> None:
    subjects = ("guitar", "plot of the film", "battery", "kitchen knife", "garden", "wine", "maps")
    texts = [f"They look for a good {subject} and will praise it." for subject in subjects]
    reviews = [f"I bought it for the {subject}, and I was right." for subject in subjects]
    found = score_texts(minilm, texts, reviews)
    assert found is not None
    assert found.difference.low > 0.1
    same = score_texts(minilm, ["They will like it."] * len(reviews), reviews)
    assert same is not None
    assert not same.difference.excludes_zero  # one text for all knows nothing of its row


def test_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    hint = r"the similarity of texts .*pip install 'r4r-graph\[similarity\]'"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sentence_transformers", None)
        with pytest.raises(MissingExtraError, match=hint):
            embedding_similarity()
    monkeypatch.setattr("r4r_graph.evaluation.words.likeness.PACKAGED", "no_such_package")
    with pytest.raises(MissingExtraError, match=hint):
        embedding_similarity()


@needs_minilm
def test_only_directories_of_safetensors(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="all-MiniLM-L6-v2 is no directory"):
        embedding_similarity("sentence-transformers/all-MiniLM-L6-v2")
    with pytest.raises(ModelError, match="cannot load"):
        embedding_similarity(tmp_path)
    (tmp_path / "2_Dense").mkdir()
    (tmp_path / "2_Dense" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="pickled weights"):
        embedding_similarity(tmp_path)
    with pytest.raises(SettingError, match="bad device 'nowhere'"):
        embedding_similarity(device="nowhere")


@needs_minilm
def test_code_in_a_directory_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(
        json.dumps([{"idx": 0, "name": "0", "path": "", "type": "mine.Module"}])
    )
    (tmp_path / "mine.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ModelError, match="cannot load"):
        embedding_similarity(tmp_path)


# BLEURT -----------------------------------------------------------------------------------------

WORDS = ["warm", "voice", "loud", "drums", "the", "is", "are", "and"]


def make_bert(folder: Path, *, labels: int = 1, head: bool = True) -> Path:
    """A tiny random BERT with a head for sequences, or without."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer: Any = BertTokenizerFast(
        vocab={word: at for at, word in enumerate(vocabulary)}, model_max_length=32
    )
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.5,
        num_labels=labels,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = BertForSequenceClassification(config)
    (model if head else model.bert).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert(tmp_path_factory.mktemp("bleurt") / "tiny")


def test_bleurt_reads_the_reference_first(checkpoint: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    scorer = bleurt(checkpoint, device="cpu")
    assert scorer.name == "bleurt"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    texts = ["warm voice", "the drums are loud and loud", "is"] * 15
    references = ["the voice is warm", "loud", "drums and voice and drums"] * 15
    wanted = []
    with torch.inference_mode():
        for text, reference in zip(texts, references, strict=True):
            batch = tokenizer(reference, text, return_tensors="pt")
            wanted.append(float(model(**batch).logits[0, 0]))
    assert scorer.score(texts, references) == pytest.approx(wanted, abs=1e-5)
    assert scorer.score(references, texts) != pytest.approx(wanted, abs=1e-3)
    assert scorer.score([], []) == []


def test_bleurt_cuts_what_is_over_its_window(checkpoint: Path) -> None:
    scorer = bleurt(checkpoint, device="cpu")
    long = "warm voice " * 200
    [alone, beside] = scorer.score(["loud", "is"], [long, "is"])
    assert alone is not None
    assert beside is not None
    [cut] = scorer.score(["loud"], ["warm voice " * 14])  # 28 words, and four more tokens
    assert alone == pytest.approx(cut, abs=1e-5)


def test_what_is_no_bleurt_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="is no directory"):
        bleurt("bleurt/tiny")
    with pytest.raises(ModelNotFoundError, match="has no weights"):
        bleurt(tmp_path)
    with pytest.raises(ModelError, match="it has 2 labels, not one"):
        bleurt(make_bert(tmp_path / "two", labels=2))
    bare = make_bert(tmp_path / "bare", head=False)
    with pytest.raises(ModelError, match=r"lacks the weights classifier\."):
        bleurt(bare)
    pickled = make_bert(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only pickled weights"):
        bleurt(pickled)
    broken = make_bert(tmp_path / "broken")
    (broken / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot load"):
        bleurt(broken)
