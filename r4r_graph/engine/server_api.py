"""The HTTP side of a model server: one pool of connections, tries, time-outs, errors with a reason.

    POST /v1/completions    with token ids as the prompt, as text or as a stream
    GET  /v1/models         which names are served

The key comes from the environment (`R4R_API_KEY`, else `OPENAI_API_KEY`) and goes nowhere else.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
import tenacity

from r4r_graph.chat_models import http_status, may_pass, pause, public, reason_of
from r4r_graph.errors import EngineBusyError, EngineFailure, R4RError, RequestError, SettingError

KEYS = ("R4R_API_KEY", "OPENAI_API_KEY")
"""Environment variables that may hold the key; the first one that is set is sent."""

TIMEOUT, ATTEMPTS = 300.0, 4
_CONNECT_SECONDS = 10.0
_AT_FAULT = frozenset({400, 404, 405, 413, 415, 422})  # HTTP statuses of a request at fault

Json = dict[str, Any]
T = TypeVar("T")


def server_root(url: str) -> str:
    """The address of a server, without `/v1` and what stands behind it.

    Raises:
        SettingError: no http(s) address, or one with a password in it.
    """
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SettingError(f"bad engine address {public(url)!r}: write http://HOST:PORT")
    if "@" in parts.netloc or parts.query:
        raise SettingError(
            f"the engine address {public(url)!r} holds a key; set {KEYS[0]} in the environment "
            "instead"
        )
    return url.strip().rstrip("/").removesuffix("/v1")


class ServerApi:
    """Calls of one server. Its coroutines belong to one event loop.

    Args:
        url: as `http://127.0.0.1:8000`, with or without `/v1`.
        timeout: seconds without a byte before a call counts as failed.
        attempts: tries of a call that a later one may answer (429, 5xx, a connection lost).
        at_once: connections.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = TIMEOUT,
        attempts: int = ATTEMPTS,
        at_once: int = 64,
    ) -> None:
        if timeout <= 0 or attempts < 1 or at_once < 1:
            raise SettingError(
                f"bad server settings: timeout={timeout}, attempts={attempts}, at_once={at_once}"
            )
        self.url = server_root(url)
        self._attempts = attempts
        key = next((key for name in KEYS if (key := os.environ.get(name))), None)
        self._client = httpx.AsyncClient(
            base_url=f"{self.url}/v1/",
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(timeout, connect=min(timeout, _CONNECT_SECONDS), pool=None),
            limits=httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once),
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    async def models(self) -> list[Json]:
        """The cards of what is served.

        Raises:
            EngineError: see `complete`.
        """
        cards = (await self._answered("GET", "models")).get("data")
        if not isinstance(cards, list) or not all(
            isinstance(card, dict) and isinstance(card.get("id"), str) for card in cards
        ):
            raise EngineFailure(f"{self.url} is no OpenAI-compatible server: it lists no models")
        return cards

    async def complete(self, body: Mapping[str, Any]) -> Json:
        """The answer to a completion.

        Raises:
            RequestError: the server refuses this request.
            EngineBusyError: it is still overloaded after the last try.
            EngineFailure: it cannot be reached, refuses the key, or failed.
        """
        return await self._answered("POST", "completions", body)

    async def stream(self, body: Mapping[str, Any]) -> AsyncGenerator[Json]:
        """The parts of a completion as they come. Once it has begun, nothing is tried again.

        Raises:
            EngineError: as `complete`.
        """
        more = {"stream": True, "stream_options": {"include_usage": True}}

        async def opened() -> httpx.Response:
            request = self._client.build_request("POST", "completions", json={**body, **more})
            return await _sound(await self._client.send(request, stream=True))

        response = await self._tried(opened)
        try:
            async for line in response.aiter_lines():
                if not line.startswith("data:") or (data := line[5:].strip()) == "[DONE]":
                    continue
                part = json.loads(data)
                if "error" in part:
                    raise EngineFailure(f"the model server {self.url} failed: {_said(part)}")
                yield part
        except (httpx.HTTPError, ValueError) as error:
            raise self._refusal(error) from error
        finally:
            await response.aclose()

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def _answered(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> Json:
        async def call() -> Json:
            response = await _sound(await self._client.request(method, path, json=body))
            answer = response.json()
            if not isinstance(answer, dict):
                raise ValueError("an answer that is no JSON object")
            return answer

        return await self._tried(call)

    async def _tried(self, call: Callable[[], Awaitable[T]]) -> T:
        tries = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self._attempts),
            wait=pause,
            retry=tenacity.retry_if_exception(may_pass),
            reraise=True,
        )
        try:
            return await tries(call)
        except (httpx.HTTPError, ValueError) as error:
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> R4RError:
        """The error of our own kind."""
        if isinstance(error, R4RError):
            return error
        who, status = f"the model server {self.url}", http_status(error)
        if status is None:
            what = "did not answer in time" if isinstance(error, httpx.TimeoutException) else None
            if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
                what = "cannot be reached"
            return EngineFailure(f"{who} {what or 'gave no answer'}: {reason_of(error)}")
        said = public(_body(error))[:300] or "no reason given"
        if status in (401, 403):
            return EngineFailure(f"{who} refused the key (HTTP {status}); set {KEYS[0]}: {said}")
        if status in (429, 503):
            return EngineBusyError(f"{who} is overloaded (HTTP {status}): {said}")
        if status in _AT_FAULT:
            return RequestError(f"{who} refused the request (HTTP {status}): {said}")
        return EngineFailure(f"{who} failed (HTTP {status}): {said}")


async def _sound(response: httpx.Response) -> httpx.Response:
    """The response, if it is none of a failure."""
    if not response.is_success:
        await response.aread()
        await response.aclose()
        response.raise_for_status()
    return response


def _body(error: Exception) -> str:
    response: httpx.Response = error.response  # type: ignore[attr-defined]
    try:
        return _said(response.json())
    except ValueError:
        return response.text


def _said(answer: Any) -> str:
    """The message in an answer that tells of an error."""
    inner = answer.get("error", answer) if isinstance(answer, dict) else answer
    said = inner.get("message", inner) if isinstance(inner, dict) else inner
    return " ".join(str(said).split())
