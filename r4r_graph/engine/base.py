"""What an engine is: two verbs, their requests and results, and the token arithmetic around them.

An engine serves many adapters of one base model. The experts know nothing else of a model.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from r4r_graph.errors import RequestError
from r4r_graph.ratings import RatingDistribution, RatingScale

Role = Literal["system", "user", "assistant"]

OutputFormat = Literal["text", "aspects"]
"""`text` is free; `aspects` is the summarizer's three lists, enforced token by token."""

OnText = Callable[[str], None]
"""Receives each new piece of a generated text, on the engine's own thread: it must be quick."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a prompt."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Ask for a text."""

    messages: tuple[Message, ...]
    adapter: str | None = None
    """Name of the adapter to answer with; None is the base model alone."""
    max_tokens: int = 192
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    seed: int = 0
    """Decides the sample, whatever batch the request lands in. Unused when greedy."""
    format: OutputFormat = "text"
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    no_repeat: int = 0
    """No run of so many tokens is written twice (0: it may be), where an engine can see to that."""
    siblings: int = field(default=1, compare=False)
    """How many requests like this one are on their way at the same moment (a fan-out's size):
    a batching engine waits a few milliseconds for them."""


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """A generated text and what it cost."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish: Literal["stop", "length"]
    """`length`: the text was cut at `max_tokens`."""


@dataclass(frozen=True, slots=True)
class RateRequest:
    """Ask for a distribution over a rating scale: the answer's first words, never parsed text."""

    messages: tuple[Message, ...]
    scale: RatingScale = RatingScale()  # noqa: RUF009 - frozen
    adapter: str | None = None
    siblings: int = field(default=1, compare=False)


RatingSource = Literal["logits", "logprobs", "samples"]
"""Where a distribution comes from: all of the model's logits at the answer's place; the likeliest
tokens that a model told of; or the shares of answers that were drawn."""


@dataclass(frozen=True, slots=True)
class RateResult:
    """A rating distribution and what it cost."""

    distribution: RatingDistribution
    prompt_tokens: int
    source: RatingSource = "logits"
    completion_tokens: int = 1
    """More than one where answers were drawn."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Which weights answer."""

    base: str
    """Name of the base model."""
    digest: str
    """Digest of its weights."""
    device: str
    dtype: str
    adapters: Mapping[str, str] = field(default_factory=dict)
    """Adapter name to the digest of its weights."""
    max_tokens: int = 8192
    """Positions of the model: prompt and answer together."""
    trained_with: Mapping[str, Any] = field(default_factory=dict)
    """`history` and `budgets` that the adapters were trained with, where they say so: how they are
    to be asked."""


@runtime_checkable
class TokenMeter(Protocol):
    """Token arithmetic of the engine's tokenizer, for prompts that must fit a budget."""

    @property
    def special_tokens(self) -> Sequence[str]:
        """Strings that the tokenizer turns into control tokens."""
        ...

    def count(self, text: str) -> int:
        """Tokens in `text`, without any special token around it."""
        ...

    def head(self, text: str, limit: int) -> str:
        """The longest beginning of `text` of at most `limit` tokens."""
        ...


def check_decoding(request: GenerateRequest) -> None:
    """Refuse decoding settings that no engine can serve.

    Raises:
        RequestError: it names them.
    """
    sound = request.max_tokens >= 1 and math.isfinite(request.temperature)
    sound = sound and request.no_repeat >= 0
    if not sound or request.temperature < 0 or not 0 < request.top_p <= 1:
        raise RequestError(
            f"bad decoding settings: max_tokens={request.max_tokens}, "
            f"temperature={request.temperature}, top_p={request.top_p}, "
            f"no_repeat={request.no_repeat}"
        )


ResultT_co = TypeVar("ResultT_co", bound=GenerateResult | RateResult, covariant=True)


@runtime_checkable
class Engine(Protocol):
    """Serves `GenerateRequest`s and `RateRequest`s.

    Both verbs take any number of requests and keep their order. With `return_exceptions` a
    failed request's place holds its error; without, the first error is raised once all requests
    have ended. Every method may be called from any thread, and the async twins from any loop.
    """

    @property
    def info(self) -> EngineInfo:
        """Which weights answer."""
        ...

    @property
    def meter(self) -> TokenMeter:
        """Token arithmetic."""
        ...

    def fingerprint(self, request: GenerateRequest) -> str:
        """Identifies the answer to a greedy request: a digest of the rendered token ids, the
        weights, the dtype, the output grammar and the decoding settings."""
        ...

    def submit(
        self, request: GenerateRequest, on_text: OnText | None = None
    ) -> Future[GenerateResult]:
        """Queue one request. Cancelling the future stops the generation at its next token."""
        ...

    def asubmit(
        self, request: GenerateRequest, on_text: OnText | None = None
    ) -> Awaitable[GenerateResult]:
        """As `submit`, awaited without holding a thread; cancelling the task stops it."""
        ...

    def generate(
        self, requests: Sequence[GenerateRequest], *, return_exceptions: bool = False
    ) -> list[GenerateResult]:
        """Texts for the requests."""
        ...

    def rate(
        self, requests: Sequence[RateRequest], *, return_exceptions: bool = False
    ) -> list[RateResult]:
        """Rating distributions for the requests."""
        ...

    async def agenerate(
        self, requests: Sequence[GenerateRequest], *, return_exceptions: bool = False
    ) -> list[GenerateResult]:
        """As `generate`."""
        ...

    async def arate(
        self, requests: Sequence[RateRequest], *, return_exceptions: bool = False
    ) -> list[RateResult]:
        """As `rate`."""
        ...

    def close(self) -> None:
        """Stop serving; what is queued ends with an error."""
        ...
