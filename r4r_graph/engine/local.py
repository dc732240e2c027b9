"""The local engine: one base model in memory, any number of LoRA adapters, batched on one thread.

`load_local_engine` finds base model and adapters, checks that they fit, and returns a
`BatchingEngine` over a `LocalBackend`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
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
from r4r_graph.engine.batching import BatchingEngine, Prepared, Request, Row
from r4r_graph.engine.contexts import CONTEXT_CACHE_MB, LEAST, ContextCache, positions
from r4r_graph.engine.decoding import GRAMMAR_FACTS, Grammars, RatingReadout
from r4r_graph.engine.tokens import HubTokenMeter, opening_of
from r4r_graph.errors import RequestError, SettingError
from r4r_graph.ratings import RatingScale

if TYPE_CHECKING:
    import torch


class LocalBackend:
    """Computes batches with transformers and PEFT. Not thread-safe: one thread calls it.

    Args:
        model: a causal language model, without adapters.
        tokenizer: its fast tokenizer, with a chat template.
        info: what to report; `info.adapters` must name the `adapters`.
        adapters: adapter name to PEFT directory.
        calibrations: adapter name to what its rating distributions are passed through.
        context_bytes: how much of the latest contexts is kept (see `engine.contexts`); 0 reads
            every prompt from its beginning.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        info: EngineInfo,
        adapters: Mapping[str, Path],
        calibrations: Mapping[str, Calibration] | None = None,
        context_bytes: int = 0,
    ) -> None:
        from transformers import GenerationConfig

        self.info = info
        self.meter = HubTokenMeter(tokenizer)
        self._tokenizer = tokenizer
        self._grammars = Grammars(model, tokenizer)
        self._readouts: dict[RatingScale, RatingReadout] = {}
        self._calibrations = dict(calibrations or {})
        self._lock = threading.Lock()
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self._ends = sorted({i for i in (*ends, tokenizer.eos_token_id) if i is not None})
        self._pad: int = tokenizer.pad_token_id
        # Unset what the model's own settings ask for, such as a repetition penalty: it would
        # reach every request, and take a batch's padding for text.
        model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        self._shares = bool(context_bytes)
        self.contexts: ContextCache | None = None
        if ContextCache.fits(model):
            self.contexts = ContextCache(model.base_model, self._pad, context_bytes)
        self._adapted: Any = None
        self._openings: dict[str, tuple[int, ...]] = {}
        for name, path in adapters.items():
            self._add_adapter(model, name, path)
        self._model = self._adapted if self._adapted is not None else model
        self._model.eval()
        self._grammars.index(aspects.GRAMMAR)  # compiled now, not inside the first request

    def _add_adapter(self, model: Any, name: str, path: Path) -> None:
        from peft import LoraConfig, PeftModel

        config = LoraConfig.from_pretrained(str(path))
        config.inference_mode = True
        if config.alora_invocation_tokens and self.contexts is not None:
            # We read the context without it, so that behind it, it is a LoRA like any other. PEFT's
            # way masks the tokens of every layer anew, which takes half of the time of an answer.
            self._openings[name] = tuple(config.alora_invocation_tokens)
            config.alora_invocation_tokens = None
        with warnings.catch_warnings():
            # PEFT 0.21 asks Transformers 5 for an attribute it has renamed.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            # An adapter with a head of its own is meant to part from the tied embedding.
            warnings.filterwarnings("ignore", ".*`tie_word_embeddings=True` and a tied layer")
            # In the base's own precision: PEFT would lift 16 bits to 32, at half the speed.
            options: Any = {"adapter_name": name, "autocast_adapter_dtype": False}
            if self._adapted is None:
                self._adapted = PeftModel.from_pretrained(
                    model, str(path), config=config, **options
                )
            else:
                self._adapted.add_adapter(**options, peft_config=config)
                self._adapted.load_adapter(str(path), **options)

    def close(self) -> None:
        """Let go of the model."""
        self._model = self._adapted = self.contexts = None

    # On callers' threads ---------------------------------------------------------------------

    def prepare(self, request: Request) -> Prepared:
        """See `Backend.prepare`."""
        if not request.messages:
            raise RequestError("a request without messages")
        self._check_adapter(request)
        ids = self.meter.prompt(request.messages)
        key: tuple[Any, ...]
        if isinstance(request, RateRequest):
            if (calibration := self._calibration(request)) is not None:
                calibration.check_scale(request.scale)
            readout = self._readout(request.scale)
            answer = max(map(len, readout.probes))
            cost = (len(ids) + answer) * len(readout.probes)
            key = ("rate", request.adapter, request.scale)
        else:
            check_decoding(request)
            answer = request.max_tokens
            if request.format == "aspects" and answer < (least := self.least_aspect_tokens):
                raise RequestError(f"max_tokens {answer} is under the format's least, {least}")
            cost = len(ids) + answer
            key = ("generate", request.adapter, request.format)
        if len(ids) + answer > self.info.max_tokens:
            raise RequestError(
                f"a prompt of {len(ids)} tokens and an answer of up to {answer} exceed the "
                f"model's {self.info.max_tokens} positions; shorten the history or the budgets"
            )
        return Prepared(request, ids, key, cost, self._context_length(request, ids))

    def _context_length(self, request: Request, ids: tuple[int, ...]) -> int:
        """How many tokens stand before the task, if that matters."""
        if (opening := self._openings.get(request.adapter or "")) is not None:
            if (at := opening_of(ids, opening)) < 0:
                raise RequestError(
                    f"the adapter {request.adapter!r} begins at a user's turn, which this prompt "
                    "has not"
                )
            return at
        # A review is read once: what summaries have in common is too short to share.
        summary = isinstance(request, GenerateRequest) and request.format == "aspects"
        return 0 if summary or not self._shares else self.meter.context_length(ids)

    def fingerprint(self, request: GenerateRequest) -> str:
        """See `Engine.fingerprint`."""
        self._check_adapter(request)
        facts = {
            "ids": self.meter.prompt(request.messages),
            "base": self.info.digest,
            "adapter": request.adapter and self.info.adapters[request.adapter],
            "dtype": self.info.dtype,
            "grammar": GRAMMAR_FACTS if request.format == "aspects" else None,
            "max_tokens": request.max_tokens,
            "stop": request.stop,
            **({"no_repeat": request.no_repeat} if request.no_repeat else {}),
            "sample": [request.temperature, request.top_p, request.seed]
            if request.temperature
            else None,
        }
        packed = json.dumps(facts, sort_keys=True).encode()
        return hashlib.blake2b(packed, digest_size=16).hexdigest()

    def _check_adapter(self, request: Request) -> None:
        if request.adapter is not None and request.adapter not in self.info.adapters:
            loaded = ", ".join(sorted(self.info.adapters)) or "none"
            raise RequestError(f"no adapter {request.adapter!r} is loaded (loaded: {loaded})")

    @property
    def least_aspect_tokens(self) -> int:
        """The smallest `max_tokens` with which an aspect summary can always be closed."""
        return self._grammars.shortest_aspects + 8

    def _readout(self, scale: RatingScale) -> RatingReadout:
        with self._lock:
            if scale not in self._readouts:
                self._readouts[scale] = RatingReadout(self._grammars, scale)
            return self._readouts[scale]

    def _calibration(self, request: RateRequest) -> Calibration | None:
        return None if request.adapter is None else self._calibrations.get(request.adapter)

    # On the engine's thread ------------------------------------------------------------------

    def rate(self, rows: Sequence[Row]) -> list[RateResult | Exception]:
        """One forward pass: rows x probes, left-padded, logits kept at the open positions."""
        import torch

        request = rows[0].prepared.request
        assert isinstance(request, RateRequest)
        readout = self._readout(request.scale)
        calibration = self._calibration(request)
        depth = max(map(len, readout.probes))
        sequences: list[tuple[int, ...]] = []
        cuts: list[int] = []
        for row in rows:
            for probe in readout.probes:
                # Shorter probes are filled up behind, where nothing is read.
                fill = (self._pad,) * (depth - len(probe))
                sequences.append((*row.prepared.ids, *probe, *fill))
                cuts.append(row.prepared.context)
        with torch.inference_mode():
            batch = self._batch(request.adapter, sequences, cuts)
            with self._adapter(request.adapter):
                logits = self._model(
                    input_ids=batch.ids[:, batch.read :],
                    attention_mask=batch.mask,
                    position_ids=positions(batch.mask)[:, batch.read :],
                    logits_to_keep=depth + 1,
                    use_cache=bool(batch.cache),
                    **batch.cache,
                ).logits
        log_probs = torch.log_softmax(logits.float(), dim=-1).cpu()
        results: list[RateResult | Exception] = []
        for i, row in enumerate(rows):
            places = {}
            for j, probe in enumerate(readout.probes):
                for at in range(len(probe) + 1):
                    places[probe[:at]] = log_probs[i * len(readout.probes) + j, at]
            distribution = readout.read(places)
            if calibration is not None:
                distribution = calibration.apply(distribution)
            results.append(RateResult(distribution, len(row.prepared.ids)))
        return results

    def generate(self, rows: Sequence[Row]) -> list[GenerateResult | Exception]:
        """One call of transformers' `generate`, with each row's own sampling and stopping."""
        import torch
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        from r4r_graph.engine.rows import RowSampler, RowStopper

        requests = [_generate_request(row) for row in rows]
        with torch.inference_mode():
            batch = self._batch(
                requests[0].adapter,
                [row.prepared.ids for row in rows],
                [row.prepared.context for row in rows],
            )
        width = batch.ids.shape[1]
        stopper = RowStopper(rows, width, self._ends, self._text)
        sampler = RowSampler(requests, width, self._grammars, stopper.done)
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=max(request.max_tokens for request in requests),
            do_sample=False,
            eos_token_id=self._ends,
            pad_token_id=self._pad,
        )
        with self._adapter(requests[0].adapter), torch.inference_mode():
            output = self._model.generate(
                input_ids=batch.ids,
                attention_mask=batch.mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([sampler]),
                stopping_criteria=StoppingCriteriaList([stopper]),
                **batch.cache,
            )
        answers = output[:, width:].tolist()
        return [
            stopper.result(i, answer, len(row.prepared.ids))
            for i, (row, answer) in enumerate(zip(rows, answers, strict=True))
        ]

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _batch(
        self, adapter: str | None, sequences: Sequence[tuple[int, ...]], cuts: Sequence[int]
    ) -> _Batch:
        """The rows' inputs; where it pays, with their contexts (the first `cuts` tokens) read
        already."""
        import torch

        contexts = [ids[:cut] for ids, cut in zip(sequences, cuts, strict=True)]
        # Under which adapter a context is read: none, where it begins behind the context.
        space = "" if adapter is None or adapter in self._openings else adapter
        if self.contexts is None or not self._apart(adapter, space, contexts):
            return _Batch(*self._left_padded(sequences))
        with self._adapter(space or None):
            read = iter(self.contexts.read(space, [context for context in contexts if context]))
        begun_with = [(next(read) if ids else None, len(ids)) for ids in contexts]
        cache, before = self.contexts.join(begun_with)
        ids, mask = self._left_padded([ids[cut:] for ids, cut in zip(sequences, cuts, strict=True)])
        begun, _ = self._left_padded(contexts)
        return _Batch(
            torch.cat([begun, ids], dim=1),
            torch.cat([before, mask], dim=1),
            before.shape[1],
            {self.contexts.argument: cache},
        )

    def _apart(self, adapter: str | None, space: str, contexts: Sequence[tuple[int, ...]]) -> bool:
        """Whether contexts are read apart from what follows them: where an adapter must not see
        them, and where that saves more than it costs."""
        if adapter in self._openings:
            return any(contexts)
        if self.contexts is None or not self._shares or min(map(len, contexts)) < LEAST:
            return False
        return not space or self.contexts.pays(space, contexts)

    def _left_padded(
        self, sequences: Sequence[tuple[int, ...]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and attention mask, shape (rows, longest)."""
        import torch

        width = max(map(len, sequences))
        ids = [[self._pad] * (width - len(s)) + list(s) for s in sequences]
        mask = [[0] * (width - len(s)) + [1] * len(s) for s in sequences]
        device = self._model.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    @contextlib.contextmanager
    def _adapter(self, name: str | None) -> Iterator[None]:
        """Answer with this adapter, or with the base model alone."""
        if self._adapted is None:
            yield
        elif name is None:
            with self._adapted.disable_adapter():
                yield
        else:
            self._adapted.set_adapter(name, inference_mode=True)
            yield


@dataclass(frozen=True, slots=True)
class _Batch:
    """The inputs of one forward pass."""

    ids: torch.Tensor
    """Shape (rows, longest), as `mask`."""
    mask: torch.Tensor
    read: int = 0
    """How many of the columns are read already: their keys and values are in `cache`."""
    cache: Mapping[str, Any] = field(default_factory=dict)


def _generate_request(row: Row) -> GenerateRequest:
    assert isinstance(row.prepared.request, GenerateRequest)
    return row.prepared.request


def load_local_engine(
    base: str | Path = "smollm2-135m",
    adapters: str | Path | Mapping[str, str | Path | None] | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    quantize_4bit: bool = False,
    prompts: Mapping[str, str] | None = None,
    allow_prompt_mismatch: bool = False,
    max_batch_tokens: int | None = None,
    context_cache_mb: int = CONTEXT_CACHE_MB,
    calibrated: bool = True,
) -> tuple[BatchingEngine, list[str]]:
    """Load a base model and its adapters; returns the engine and warnings.

    Args:
        base: `smollm2-135m`, a local directory, or a Hub id.
        adapters: a directory with `summarizer/`, `reasoner/`, `predictor/` (any may be absent),
            a mapping of those names to directories, `"none"` for the base model alone, or None
            for those that come with the package for this base model, if there are any.
        device: `cpu` or `cuda`; None takes CUDA where there is one.
        dtype: None is float32 on a CPU and bfloat16 on CUDA.
        quantize_4bit: load the base model in 4 bits (CUDA only).
        prompts: expert name to the digest of its prompt here, to hold adapters against.
        allow_prompt_mismatch: accept adapters trained on another version of their prompt.
        max_batch_tokens: token positions in one forward pass; None chooses by device.
        context_cache_mb: MiB of the latest contexts' keys and values to keep, so that prompts that
            begin alike are read once; 0 reads each from its beginning.
        calibrated: apply the calibration beside the predictor's adapter, if there is one.

    Raises:
        ModelNotFoundError, AdapterMismatchError, PromptMismatchError, SettingError
        ModelError: something else is wrong with the base or an adapter, such as a damaged file.
    """
    from r4r_graph.engine.adapters import check_adapter, find_adapters, trained_with
    from r4r_graph.engine.weights import find_base, load_model

    found_base = find_base(base)
    found = find_adapters(adapters, found_base, calibrated=calibrated)
    notes: list[str] = []
    for expert, adapter in found.items():
        notes += check_adapter(
            adapter,
            found_base,
            (prompts or {}).get(expert, ""),
            allow_prompt_mismatch=allow_prompt_mismatch,
        )
    asked, warnings = trained_with(found)
    notes += warnings
    model, tokenizer, device, dtype = load_model(
        found_base, device=device, dtype=dtype, quantize_4bit=quantize_4bit
    )
    info = EngineInfo(
        base=found_base.name,
        digest=found_base.digest,
        device=device,
        dtype=dtype,
        adapters={expert: adapter.digest for expert, adapter in found.items()},
        max_tokens=model.config.max_position_embeddings,
        trained_with=asked,
    )
    paths = {expert: adapter.path for expert, adapter in found.items()}
    calibrations = {e: a.calibration for e, a in found.items() if a.calibration is not None}
    if context_cache_mb < 0:
        raise SettingError(f"bad context_cache_mb={context_cache_mb}: 0 or more")
    backend = LocalBackend(
        model, tokenizer, info, paths, calibrations, context_bytes=context_cache_mb << 20
    )
    tokens, rows = (131072, 128) if device.startswith("cuda") else (16384, 32)
    engine = BatchingEngine(backend, max_batch_tokens=max_batch_tokens or tokens, max_rows=rows)
    return engine, notes
