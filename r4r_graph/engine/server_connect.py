"""Connecting to a model server: what it serves, whether it can what is needed, and what is known
here of its adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r4r_graph.engine.adapters import (
    EXPERTS,
    NONE,
    Adapter,
    check_adapter,
    find_adapters,
    trained_with,
)
from r4r_graph.engine.base import EngineInfo
from r4r_graph.engine.model_files import digest_files
from r4r_graph.engine.remote import AT_ONCE, LoopThread, RemoteEngine
from r4r_graph.engine.server import Served, ServerBackend, digest_of, first_choice, log_probs
from r4r_graph.engine.server_api import ATTEMPTS, TIMEOUT, Json, ServerApi
from r4r_graph.engine.weights import BaseModel, find_base, load_tokenizer
from r4r_graph.errors import ModelError, ModelNotFoundError, RequestError

_PROBE = "7"  # what no model answers by itself to being asked nothing
_POSITIONS = 8192
_HINT = "start it with the command that `r4r serve-command` prints"


def open_server_engine(
    url: str,
    base: str | Path = "smollm2-135m",
    adapters: str | Path | Mapping[str, str | Path | None] | None = None,
    *,
    prompts: Mapping[str, str] | None = None,
    allow_prompt_mismatch: bool = False,
    timeout: float = TIMEOUT,
    attempts: int = ATTEMPTS,
    at_once: int = AT_ONCE,
) -> tuple[RemoteEngine, list[str]]:
    """Connect to a model server; returns the engine and warnings.

    The key, if one is needed, comes from `R4R_API_KEY` or `OPENAI_API_KEY`.

    Args:
        url: as `http://127.0.0.1:8000`.
        base: the base model that it serves, for the tokenizer: as for the local engine, or a
            directory that holds the tokenizer alone.
        adapters: folders of the adapters that it serves, as for the local engine: their digests,
            calibration and budgets are used. None takes what the server names `summarizer`,
            `reasoner` and `predictor`, and those that come with the package to be the same;
            `"none"` is the base model alone.
        prompts: expert name to the digest of its prompt here, to hold adapters against.
        allow_prompt_mismatch: accept adapters trained on another version of their prompt.
        timeout: seconds without a byte before a call counts as failed.
        attempts: tries of a call that a later one may answer.
        at_once: requests in flight.

    Raises:
        EngineError: the server cannot be reached, refuses the key, or failed.
        ModelNotFoundError: it does not serve an adapter, or the tokenizer is not here.
        ModelError: it lacks structured outputs or log-probabilities, or has another tokenizer.
        AdapterMismatchError, PromptMismatchError, SettingError
    """
    found_base = _tokenizer_of(base)
    tokenizer = load_tokenizer(found_base)
    known = find_adapters(adapters, found_base)
    notes = _checked(known, found_base, prompts or {}, allow_prompt_mismatch)
    api = ServerApi(url, timeout=timeout, attempts=attempts, at_once=at_once)
    thread = LoopThread()
    try:
        cards = thread.run(api.models())
        card = _base_card(cards, found_base, api.url)
        names, more = _named(cards, known, adapters, api.url)
        exact = thread.run(_examine(api, card["id"], tokenizer))
        if not exact:
            more.append(
                f"{api.url} does not tell the log-probabilities of chosen tokens: each rating "
                "takes two requests, and scales of more than 20 values lose the least likely"
            )
        asked, differing = trained_with({name: known[name] for name in names if name in known})
        info = EngineInfo(
            base=found_base.name,
            digest=digest_of([found_base.digest, card["id"], card.get("root")])[:16],
            device="server",
            dtype="server",
            adapters=names,
            max_tokens=card.get("max_model_len") or _positions(tokenizer),
            trained_with=asked,
        )
        calibrations = {n: a.calibration for n, a in known.items() if a.calibration and n in names}
        backend = ServerBackend(api, Served(card["id"], exact), tokenizer, info, calibrations)
    except BaseException:
        thread.run(api.close())
        thread.stop()
        raise
    return RemoteEngine(backend, thread, at_once=at_once), [*notes, *more, *differing]


def _tokenizer_of(base: str | Path) -> BaseModel:
    """The base model, or its tokenizer alone."""
    try:
        return find_base(base)
    except ModelNotFoundError:
        folder = Path(base).expanduser()
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise
    return BaseModel(folder.name, folder.absolute(), digest_files([file]))


def _checked(
    known: Mapping[str, Adapter], base: BaseModel, prompts: Mapping[str, str], allowed: bool
) -> list[str]:
    """Warnings about adapters that are here; a tokenizer alone has no shapes to compare."""
    notes: list[str] = []
    if known and not (base.path / "config.json").is_file():
        return ["the base model's weights are not here: its adapters are taken to fit it"]
    for expert, adapter in known.items():
        notes += check_adapter(
            adapter, base, prompts.get(expert, ""), allow_prompt_mismatch=allowed
        )
    return notes


def _base_card(cards: list[Json], base: BaseModel, url: str) -> Json:
    """The card of the base model: the one with its name, else the first that is no adapter's."""
    bases = [card for card in cards if not card.get("parent") and card["id"] not in EXPERTS]
    if not bases:
        raise ModelNotFoundError(f"the model server {url} serves no base model")
    names = {base.name, *base.aliases}
    return next((card for card in bases if {card["id"], card.get("root")} & names), bases[0])


def _named(
    cards: list[Json],
    known: Mapping[str, Adapter],
    adapters: Any,
    url: str,
) -> tuple[dict[str, str], list[str]]:
    """Digests of the adapters to answer with, by name, and warnings. Of one that is not here the
    digest is that of its card."""
    served = {card["id"]: card for card in cards if card["id"] in EXPERTS}
    missing = [name for name in known if name not in served]
    if missing and adapters is not None:
        names = ", ".join(card["id"] for card in cards)
        raise ModelNotFoundError(
            f"the model server {url} serves no adapter {missing[0]!r} (it serves {names}); "
            f"{_HINT}, or pass {NONE!r} for the base model alone"
        )
    if adapters == NONE:
        return {}, []
    digests = {
        name: known[name].digest
        if name in known
        else digest_of([url, name, card.get("root"), card.get("parent")])[:16]
        for name, card in served.items()
        if adapters is None or name in known
    }
    return digests, [
        f"the model server {url} serves no adapter {name!r}: its base model answers untrained"
        for name in EXPERTS
        if adapters is None and name not in served
    ]


async def _examine(api: ServerApi, model: str, tokenizer: Any) -> bool:
    """Refuse a server that cannot what is needed; whether it tells of chosen tokens."""
    [token, other] = (tokenizer.encode(digit, add_special_tokens=False)[-1] for digit in "73")
    body = {
        "model": model,
        "prompt": [token],
        "max_tokens": 1,
        "temperature": 0.0,
        "logprobs": 1,
        "return_tokens_as_token_ids": True,
    }
    constrained = body | {"structured_outputs": {"choice": [_PROBE]}}
    try:
        answer = await api.complete(constrained)
    except RequestError as error:
        raise ModelError(f"{_lacks(api)} structured outputs: {error}") from error
    if first_choice(answer)["text"] != _PROBE:
        raise ModelError(
            f"{_lacks(api)} structured outputs: its answer left the constraint (vLLM has them "
            "from 0.12 on)"
        )
    told = log_probs(answer)
    if not told:
        raise ModelError(f"{_lacks(api)} log-probabilities by token id")
    if token not in told:
        raise ModelError(
            f"the model server {api.url} has another tokenizer than the base model here: name the "
            "base model that it serves (base, --base)"
        )
    try:
        chosen = log_probs(await api.complete(body | {"logprob_token_ids": [token, other]}))
    except RequestError:
        return False
    return {token, other} <= set(chosen)


def _lacks(api: ServerApi) -> str:
    return f"the model server {api.url} lacks"


def _positions(tokenizer: Any) -> int:
    """Positions of a model whose server does not say; tokenizers without a limit name 1e30."""
    limit = int(min(tokenizer.model_max_length, 1e9))
    return limit if limit < 1e7 else _POSITIONS
