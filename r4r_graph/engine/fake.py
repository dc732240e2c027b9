"""A deterministic engine without a model, for tests: of this library, and of what embeds it.

    engine = fake_engine()
    engine = fake_engine(rate=lambda request: [0, 0, 0, 0.2, 0.8])       # scripted ratings
    engine = fake_engine(write=lambda request: "Likes short songs.")     # scripted texts

It runs behind the same micro-batcher as the local engine, obeys seeds, formats, budgets, stop
texts and cancellation, and takes microseconds a request. A script may raise: the error reaches its
own caller alone.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from r4r_graph.engine import aspects
from r4r_graph.engine.base import (
    EngineInfo,
    GenerateRequest,
    GenerateResult,
    Message,
    RateRequest,
    RateResult,
    check_decoding,
)
from r4r_graph.engine.batching import BatchingEngine, Prepared, Request, Row
from r4r_graph.errors import RequestError
from r4r_graph.ratings import RatingDistribution
from r4r_graph.schema import AspectSummary

_BOS = 1
_LEAST_ASPECT_TOKENS = 9
_WORDS = [
    "this",
    "person",
    "may",
    "like",
    "warm",
    "honest",
    "short",
    "clear",
    "songs",
    "stories",
    "but",
    "not",
    "long",
    "cold",
    "noise",
]

T = TypeVar("T")
Write = Callable[[GenerateRequest], str]
Rate = Callable[[RateRequest], Sequence[float]]


class FakeMeter:
    """Counts words and punctuation marks as tokens."""

    special_tokens = ("<|im_start|>", "<|im_end|>", "[INST]", "[/INST]")

    def count(self, text: str) -> int:
        """Tokens in `text`."""
        return len(_tokens(text))

    def head(self, text: str, limit: int) -> str:
        """The longest beginning of `text` of at most `limit` tokens."""
        return "".join(_tokens(text)[:limit])

    def prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Made-up token ids: a beginning, then every token of every turn."""
        words = [w for m in messages for w in (f"<{m.role}>", *_tokens(m.content))]
        return (_BOS, *(2 + _number(word) % 50_000 for word in words))


class FakeBackend:
    """Computes batches out of hashes. `batches` records each batch's size, for tests."""

    def __init__(
        self,
        *,
        adapters: Sequence[str] = (),
        write: Write | None = None,
        rate: Rate | None = None,
        delay: float = 0.0,
        max_tokens: int = 8192,
    ) -> None:
        self.info = EngineInfo(
            base="fake",
            digest="fake",
            device="none",
            dtype="none",
            adapters={name: f"fake-{name}" for name in adapters},
            max_tokens=max_tokens,
        )
        self.meter = FakeMeter()
        self.batches: list[int] = []
        self._write = write
        self._rate = rate
        self._delay = delay

    def close(self) -> None:
        """Nothing to free."""

    def prepare(self, request: Request) -> Prepared:
        """See `Backend.prepare`."""
        if not request.messages:
            raise RequestError("a request without messages")
        if request.adapter is not None and request.adapter not in self.info.adapters:
            raise RequestError(f"no adapter {request.adapter!r} is loaded")
        ids = self.meter.prompt(request.messages)
        generates, answer = isinstance(request, GenerateRequest), 1
        if isinstance(request, GenerateRequest):
            check_decoding(request)
            answer = request.max_tokens
            if request.format == "aspects" and answer < _LEAST_ASPECT_TOKENS:
                raise RequestError(
                    f"max_tokens {answer} is under the format's least, {_LEAST_ASPECT_TOKENS}"
                )
        if len(ids) + answer > self.info.max_tokens:
            raise RequestError(
                f"a prompt of {len(ids)} tokens and an answer of up to {answer} exceed the "
                f"model's {self.info.max_tokens} positions; shorten the history or the budgets"
            )
        return Prepared(request, ids, (generates, request.adapter), len(ids) + answer)

    def fingerprint(self, request: GenerateRequest) -> str:
        """See `Engine.fingerprint`."""
        return self._digest(request, request.max_tokens, request.stop)

    def _digest(self, request: GenerateRequest, *more: object) -> str:
        facts = [
            self.meter.prompt(request.messages),
            request.adapter,
            request.format,
            [request.temperature, request.top_p, request.seed] if request.temperature else None,
            *more,
        ]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()

    def generate(self, rows: Sequence[Row]) -> list[GenerateResult | Exception]:
        """A batch of texts."""
        self._work(rows)
        return [self._guarded(self._text, row) for row in rows]

    def rate(self, rows: Sequence[Row]) -> list[RateResult | Exception]:
        """A batch of rating distributions."""
        self._work(rows)
        return [self._guarded(self._distribution, row) for row in rows]

    def _work(self, rows: Sequence[Row]) -> None:
        self.batches.append(len(rows))
        if self._delay:
            time.sleep(self._delay)

    @staticmethod
    def _guarded(compute: Callable[[Row], T], row: Row) -> T | Exception:
        try:
            return compute(row)
        except Exception as error:
            return error

    def _text(self, row: Row) -> GenerateResult:
        request = row.prepared.request
        assert isinstance(request, GenerateRequest)
        if self._write is not None:
            whole = self._write(request)
        else:
            whole = _invented(request, self._digest(request))
        cuts = [at for stop in request.stop if (at := whole.find(stop)) >= 0]
        tokens = _tokens(whole[: min(cuts)] if cuts else whole)
        for end in range(1, min(len(tokens), request.max_tokens) + 1):
            if row.cancelled():
                break
            if row.show is not None:
                row.show("".join(tokens[:end]))
        fits = len(tokens) <= request.max_tokens
        return GenerateResult(
            text="".join(tokens[: request.max_tokens]),
            prompt_tokens=len(row.prepared.ids),
            completion_tokens=min(len(tokens), request.max_tokens),
            finish="stop" if fits else "length",
        )

    def _distribution(self, row: Row) -> RateResult:
        request = row.prepared.request
        assert isinstance(request, RateRequest)
        if self._rate is not None:
            weights = list(self._rate(request))
        else:
            dice = random.Random(str((row.prepared.ids, request.adapter)))
            weights = [dice.random() ** 3 for _ in request.scale.values]
        total = sum(weights)
        distribution = RatingDistribution(request.scale, tuple(w / total for w in weights))
        return RateResult(distribution, len(row.prepared.ids))


def fake_engine(
    *,
    adapters: Sequence[str] = (),
    write: Write | None = None,
    rate: Rate | None = None,
    delay: float = 0.0,
) -> BatchingEngine:
    """An engine without a model.

    Args:
        adapters: names it claims to have adapters for.
        write: decides the text of every `GenerateRequest` (of either format).
        rate: decides the weights, one a scale value, of every `RateRequest`.
        delay: seconds each batch takes.
    """
    return BatchingEngine(FakeBackend(adapters=adapters, write=write, rate=rate, delay=delay))


def _invented(request: GenerateRequest, digest: str) -> str:
    dice = random.Random(digest)
    if request.format == "aspects":
        seen = re.findall(r"[a-z]{5,}", " ".join(m.content for m in request.messages[:-1]))
        lists = [dice.sample(seen, min(len(seen), dice.randint(0, 3))) for _ in range(3)]
        for phrases in lists:  # a phrase more is a word and a semicolon more
            del phrases[1 + (request.max_tokens - _LEAST_ASPECT_TOKENS) // 6 :]
        return aspects.format_aspects(AspectSummary(*map(tuple, lists)))
    return " ".join(dice.choices(_WORDS, k=dice.randint(12, 24))).capitalize() + "."


def _tokens(text: str) -> list[str]:
    return re.findall(r"\s*(?:\w+|[^\w\s])|\s+$", text)


def _number(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest())
