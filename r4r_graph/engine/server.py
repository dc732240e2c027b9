"""An engine over a model server: vLLM, or another OpenAI-compatible server that can do the same.

    vllm serve ... --lora-modules summarizer=... reasoner=... predictor=...    # r4r serve-command
    engine, warnings = open_server_engine("http://127.0.0.1:8000")            # see server_connect

The base model's tokenizer is needed here, its weights are not: prompts travel as token ids, so they
are the very ones that the local engine reads. Ratings are read at the same places of the same
automaton. A server that tells the log-probabilities of chosen tokens (`logprob_token_ids`: vLLM)
tells them before any mask; of another one the answer is constrained to the scale
(`structured_outputs`), which gives the distribution, and asked for once more without, which gives
the raw mass.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from r4r_graph.calibration import Calibration
from r4r_graph.engine import aspects
from r4r_graph.engine.base import (
    EngineInfo,
    GenerateRequest,
    GenerateResult,
    RateRequest,
    RateResult,
    check_decoding,
)
from r4r_graph.engine.decoding import Grammars, RatingReadout
from r4r_graph.engine.remote import Show
from r4r_graph.engine.server_api import Json, ServerApi
from r4r_graph.engine.tokens import HubTokenMeter
from r4r_graph.errors import EngineFailure, RequestError
from r4r_graph.ratings import RatingScale

if TYPE_CHECKING:
    import torch

_WORD = r"[^\s;<>]{1,24}"
_PHRASE = rf"{_WORD}( {_WORD}){{0,7}}"
_LIST = rf"{_PHRASE}(; {_PHRASE}){{0,{aspects.MAX_PHRASES - 1}}}"
ASPECTS = r"\n".join(f"{name}: {_LIST}" for name in aspects.SECTIONS)
"""The aspect format as a server enforces it. Phrases are bounded in words, where the local engine
bounds them in tokens; what the token budget cuts off is closed here."""

_PLAIN = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Said with each request: a server may take other values from the model's own settings."""

_NEVER = -9000.0  # vLLM writes -9999 for a probability of zero
_LEAST_MASS = 1e-12
_TOP = 20  # log-probabilities that servers tell of one place, by default


Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Served:
    """What a server was found to be."""

    base: str
    """Name under which it serves the base model."""
    exact: bool
    """Whether it tells the log-probabilities of chosen tokens."""


class ServerBackend:
    """Answers requests through a model server.

    Args:
        api: its calls.
        served: what it was found to be.
        tokenizer: the base model's.
        info: what to report; adapters go by the names that the server gives them.
        calibrations: adapter name to what its rating distributions are passed through.
    """

    def __init__(
        self,
        api: ServerApi,
        served: Served,
        tokenizer: Any,
        info: EngineInfo,
        calibrations: Mapping[str, Calibration] | None = None,
    ) -> None:
        self.info = info
        self.meter = HubTokenMeter(tokenizer)
        self._api = api
        self._served = served
        self._calibrations = dict(calibrations or {})
        self._grammars = Grammars(None, tokenizer)
        self._readouts: dict[RatingScale, RatingReadout] = {}
        self._lock = threading.Lock()

    async def close(self) -> None:
        """Close the connections."""
        await self._api.close()

    def fingerprint(self, request: GenerateRequest) -> str:
        """See `Engine.fingerprint`."""
        self._check_adapter(request.adapter)
        facts = {
            "ids": self.meter.prompt(request.messages),
            "server": [self._served.base, self.info.digest],
            "adapter": request.adapter and [request.adapter, self.info.adapters[request.adapter]],
            "grammar": [aspects.GRAMMAR_VERSION, ASPECTS] if request.format == "aspects" else None,
            "max_tokens": request.max_tokens,
            "stop": request.stop,
            **({"no_repeat": request.no_repeat} if request.no_repeat else {}),
            "sample": [request.temperature, request.top_p, request.seed]
            if request.temperature
            else None,
        }
        return digest_of(facts)

    # Texts -----------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest, show: Show | None) -> GenerateResult:
        """See `RemoteBackend.generate`."""
        check_decoding(request)
        listed = request.format == "aspects"
        if listed and request.max_tokens < (least := self.least_aspect_tokens):
            raise RequestError(
                f"max_tokens {request.max_tokens} is under the format's least, {least}"
            )
        ids = self._prompt(request, request.max_tokens)
        body = {
            **self._body(request.adapter, ids, request.max_tokens),
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed & 0x7FFF_FFFF_FFFF_FFFF,
            "stop": list(request.stop),
        }
        if listed:
            body["structured_outputs"] = {"regex": ASPECTS}
        if size := request.no_repeat:  # vLLM ends an answer that goes round in circles
            circle = {"min_pattern_size": size, "max_pattern_size": 8 * size, "min_count": 2}
            body["repetition_detection"] = circle
        text, finish, usage = await self._text(body, show)
        if finish in ("abort", "error"):
            raise EngineFailure(f"the model server {self._api.url} broke an answer off ({finish})")
        if listed and finish == "length":
            end = aspects.closing(text)
            if end and show is not None:
                await show(end)
            text, finish = text + end, "stop"
        return GenerateResult(
            text=text,
            prompt_tokens=usage.get("prompt_tokens", len(ids)),
            completion_tokens=usage.get("completion_tokens", 0),
            finish="length" if finish == "length" else "stop",
        )

    @property
    def least_aspect_tokens(self) -> int:
        """The smallest `max_tokens` for an aspect summary: that of an empty one."""
        return self._grammars.shortest_aspects

    async def _text(self, body: Json, show: Show | None) -> tuple[str, str, Json]:
        """A completion's text, why it ended, and its usage."""
        if show is None:
            answer = await self._api.complete(body)
            choice = first_choice(answer)
            return choice["text"], choice.get("finish_reason") or "", answer.get("usage") or {}
        text, finish = "", ""
        usage: Json = {}
        async with aclosing(self._api.stream(body)) as parts:
            async for part in parts:
                usage = part.get("usage") or usage
                for choice in part.get("choices", ()):
                    finish = choice.get("finish_reason") or finish
                    if piece := choice.get("text"):
                        text += piece
                        await show(piece)
        if not finish:
            raise EngineFailure(f"the model server {self._api.url} ended an answer before its end")
        return text, finish, usage

    # Ratings ---------------------------------------------------------------------------------

    async def rate(self, request: RateRequest) -> RateResult:
        """See `RemoteBackend.rate`: one request an open place of the scale's automaton."""
        readout = self._readout(request.scale)
        calibration = self._calibrations.get(request.adapter or "")
        if calibration is not None:
            calibration.check_scale(request.scale)
        ids = self._prompt(request, max(map(len, readout.probes)))
        places = list(_places(readout.root))
        ask = self._exact if self._served.exact else self._masked
        found = await asyncio.gather(
            *(ask(request, ids, prefix, tokens) for prefix, tokens in places)
        )
        log_probs = {p: _vector(known) for (p, _), known in zip(places, found, strict=True)}
        distribution = readout.read(log_probs)
        if calibration is not None:
            distribution = calibration.apply(distribution)
        return RateResult(distribution, len(ids), "logits" if self._served.exact else "logprobs")

    async def _exact(
        self, request: RateRequest, ids: Ids, prefix: Ids, tokens: Sequence[int]
    ) -> Mapping[int, float]:
        """Log-probabilities of these tokens at this place, before any mask."""
        chosen = {"logprobs": 1, "logprob_token_ids": list(tokens)}
        found = await self._next(request, ids + prefix, chosen)
        if missing := [token for token in tokens if token not in found]:
            raise EngineFailure(
                f"the model server {self._api.url} told nothing of tokens {missing}"
            )
        return found

    async def _masked(
        self, request: RateRequest, ids: Ids, prefix: Ids, tokens: Sequence[int]
    ) -> Mapping[int, float]:
        """The same out of an answer that is constrained to the scale, for the shares, and at the
        first place another one without constraint, for the mass."""
        begun = "".join(self._grammars.token_text[token] for token in prefix)
        constraint = _constraint(request.scale, begun)
        asked = [self._next(request, ids + prefix, {"logprobs": _TOP} | constraint)]
        if not prefix:
            asked.append(self._next(request, ids, {"logprobs": _TOP}))
        shares, *raw = await asyncio.gather(*asked)
        if not any(shares.get(token, -math.inf) > _NEVER for token in tokens):
            raise EngineFailure(f"the model server {self._api.url} left the rating scale")
        mass = sum(math.exp(raw[0].get(token, -math.inf)) for token in tokens) if raw else 1.0
        shift = math.log(max(mass, _LEAST_MASS))
        return {token: shares[token] + shift for token in tokens if token in shares}

    async def _next(self, request: RateRequest, ids: Ids, more: Json) -> dict[int, float]:
        """Log-probabilities that the server tells of the next token, by token id."""
        body = self._body(request.adapter, ids, 1) | {"temperature": 0.0} | more
        return log_probs(await self._api.complete(body | {"return_tokens_as_token_ids": True}))

    # Both ------------------------------------------------------------------------------------

    def _body(self, adapter: str | None, ids: Sequence[int], max_tokens: int) -> Json:
        model = self._served.base if adapter is None else adapter
        return {"model": model, "prompt": list(ids), "max_tokens": max_tokens, **_PLAIN}

    def _prompt(self, request: GenerateRequest | RateRequest, answer: int) -> tuple[int, ...]:
        """Its token ids, checked."""
        if not request.messages:
            raise RequestError("a request without messages")
        self._check_adapter(request.adapter)
        ids = self.meter.prompt(request.messages)
        if len(ids) + answer > self.info.max_tokens:
            raise RequestError(
                f"a prompt of {len(ids)} tokens and an answer of up to {answer} exceed the "
                f"model's {self.info.max_tokens} positions; shorten the history or the budgets"
            )
        return ids

    def _check_adapter(self, name: str | None) -> None:
        if name is not None and name not in self.info.adapters:
            served = ", ".join(sorted(self.info.adapters)) or "none"
            raise RequestError(f"no adapter {name!r} is served (served: {served})")

    def _readout(self, scale: RatingScale) -> RatingReadout:
        with self._lock:
            if scale not in self._readouts:
                self._readouts[scale] = RatingReadout(self._grammars, scale)
            return self._readouts[scale]


def first_choice(answer: Json) -> Json:
    """The one choice of an answer.

    Raises:
        EngineFailure: it has none with a text.
    """
    choices = answer.get("choices")
    if not choices or not isinstance(choices[0].get("text"), str):
        raise EngineFailure("the model server gave an answer without a text")
    choice: Json = choices[0]
    return choice


def log_probs(answer: Json) -> dict[int, float]:
    """What an answer tells of its first token, by token id; empty where it tells nothing."""
    told = first_choice(answer).get("logprobs") or {}
    top = (told.get("top_logprobs") or [None])[0] or {}
    return {
        int(token.removeprefix("token_id:")): float(value)
        for token, value in top.items()
        if re.fullmatch(r"token_id:\d+", token)
    }


def digest_of(facts: Any) -> str:
    """32 hex digits over plain JSON values."""
    packed = json.dumps(facts, sort_keys=True).encode()
    return hashlib.blake2b(packed, digest_size=16).hexdigest()


def _constraint(scale: RatingScale, begun: str) -> Json:
    """What an answer that has begun like this may go on with."""
    if not begun:
        return {"structured_outputs": {"choice": list(scale.labels)}}
    rest = [re.escape(label[len(begun) :]) for label in scale.labels if label.startswith(begun)]
    optional = "?" if begun in scale.labels else ""
    return {"structured_outputs": {"regex": f"({'|'.join(filter(None, rest))}){optional}"}}


def _places(branch: Any) -> Iterator[tuple[Ids, list[int]]]:
    """Each open place of a scale's automaton, and the tokens that lead on from it."""
    yield branch.prefix, list(branch.steps)
    for step in branch.steps.values():
        if not isinstance(step, int):
            yield from _places(step)


def _vector(known: Mapping[int, float]) -> torch.Tensor:
    """Log-probabilities by token id, as far as the greatest id goes."""
    import torch

    vector = torch.full((max(known) + 1,), -torch.inf)
    vector[list(known)] = torch.tensor(list(known.values()))
    return vector
