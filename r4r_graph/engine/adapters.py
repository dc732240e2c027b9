"""Finds LoRA adapters, one for each expert, and checks that they fit the base model and prompt.

An adapter is a directory in PEFT's format (adapter_config.json, adapter_model.safetensors), with
an optional `r4r.json` that says what it was trained for:

    {"expert": "reasoner", "base_model": "smollm2-135m", "base_digest": "0123456789abcdef",
     "prompt": {"name": "reasoner", "version": 1, "digest": "..."},
     "trained_with": {"history": 10, "budgets": {"side": 512, ...}}}

A predictor may also have a `calibration.json` (see `r4r_graph.calibration`).

Nothing here loads a model: shapes are compared by the headers of the safetensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r4r_graph.calibration import CALIBRATION_FILE, Calibration
from r4r_graph.engine.model_files import digest_files, file_digest, read_json, tensor_shapes
from r4r_graph.engine.weights import BaseModel, weight_shapes
from r4r_graph.errors import (
    AdapterMismatchError,
    ModelError,
    ModelNotFoundError,
    PromptMismatchError,
    SettingError,
)

EXPERTS = ("summarizer", "reasoner", "predictor")
"""The experts that may have an adapter of their own."""

NONE, SHIPPED = "none", "shipped"
"""In the place of a folder: the base model alone, and the adapters that come with the package."""

_SHIPPED = Path(__file__).parents[1] / "_adapters"

Shapes = Mapping[str, tuple[int, ...]]
"""Name of each weight of a model (`model.layers.0.mlp.up_proj.weight`) to its shape."""

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_NOTE = "r4r.json"
_PREFIX = "base_model.model."
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?")
_OTHER = re.compile(r".*\.(lora_\w+|token_adapter)(\..+)?")  # DoRA's vectors, tuned tokens


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter on this machine."""

    expert: str
    """One of `EXPERTS`."""
    path: Path
    digest: str
    """16 hex digits over its configuration, weights, calibration and `r4r.json`."""
    base_model: str | None
    """Name of the base model that it was trained on, if recorded."""
    base_digest: str | None
    """Digest of the base model that it was trained on, if recorded."""
    prompt: Mapping[str, Any] | None
    """Name, version and digest of the prompt that it was trained with, if recorded."""
    calibration: Calibration | None = None
    """Of a predictor: what its distributions are passed through."""
    trained_with: Mapping[str, Any] = field(default_factory=dict)
    """Length of the histories and token budgets that it was trained with, if recorded."""


def find_adapters(
    adapters: str | Path | Mapping[str, str | Path | None] | None,
    base: BaseModel | None = None,
    *,
    calibrated: bool = True,
) -> dict[str, Adapter]:
    """The adapters that `adapters` names, by expert; experts without one are left out.

    `adapters` is a directory with a subfolder for each expert, a mapping from experts to
    directories (None: no adapter), `"none"` for no adapters at all, `"shipped"` for those that
    come with the package for this base model, or None for these if there are any. Without
    `calibrated` a predictor's calibration counts for nothing, its digest included.

    Raises:
        SettingError: the mapping names an unknown expert.
        ModelNotFoundError: a directory or file is not there, or nothing is shipped for the base.
        ModelError: an adapter that is damaged, pickled, no LoRA, or another expert's, or a
            damaged calibration.
    """
    if adapters is None or adapters == SHIPPED:
        if (shipped := _shipped(base)) is not None:
            return find_adapters(shipped, base, calibrated=calibrated)
        if adapters is None:
            return {}
        raise ModelNotFoundError(
            "no adapters come with the package for "
            f"{'an unknown base model' if base is None else f'the base model {base.name!r}'}: "
            f"train some, or pass {NONE!r} to let the base model answer"
        )
    if adapters == NONE:
        return {}
    if isinstance(adapters, Mapping):
        if unknown := [name for name in adapters if name not in EXPERTS]:
            raise SettingError(
                f"no expert is called {unknown[0]!r}: adapters are for {', '.join(EXPERTS)}"
            )
        chosen = {name: Path(path).expanduser() for name, path in adapters.items() if path}
    else:
        folder = Path(adapters).expanduser()
        if not folder.is_dir():
            raise ModelNotFoundError(f"no adapters: {folder} is not a directory")
        chosen = {name: folder / name for name in EXPERTS if (folder / name).is_dir()}
        if not chosen and (folder / _CONFIG).exists():
            raise ModelNotFoundError(
                f"{folder} is a single adapter; say which expert's it is: "
                f"{{'reasoner': {str(folder)!r}}}"
            )
        if not chosen:
            raise ModelNotFoundError(f"{folder} has no subfolder named {', '.join(EXPERTS)}")
    return {
        name: _adapter(name, chosen[name].absolute(), calibrated)
        for name in EXPERTS
        if name in chosen
    }


def _shipped(base: BaseModel | None) -> Path | None:
    """The folder of the adapters that come with the package for these very weights."""
    if base is None or not _SHIPPED.is_dir():
        return None
    for folder in sorted(_SHIPPED.iterdir()):
        made_for = {_note(folder / expert, expert).get("base_digest") for expert in EXPERTS}
        if base.digest in made_for:
            return folder
    return None


def check_adapter(
    adapter: Adapter,
    base: BaseModel,
    prompt_digest: str,
    *,
    model_shapes: Callable[[], Shapes] | Shapes | None = None,
    allow_prompt_mismatch: bool = False,
) -> list[str]:
    """Refuse an adapter that was not made for `base` or for the prompt; returns warnings.

    `prompt_digest` is that of the expert's prompt here. `model_shapes` are the shapes of the
    base's weights, read from its files when left out; pass the loaded model's own where its
    modules and its files differ in names.

    Raises:
        AdapterMismatchError: made for another base model, by digest, by name or by shape.
        PromptMismatchError: trained with another prompt, and `allow_prompt_mismatch` is off.
        ModelError: the adapter's or the base's weights cannot be read.
    """
    _check_base(adapter, base)
    if model_shapes is None:
        shapes: Shapes = weight_shapes(base)
    else:
        shapes = model_shapes() if callable(model_shapes) else model_shapes
    _check_shapes(adapter, base, shapes)
    return [
        *_check_prompt(adapter, prompt_digest, allow_prompt_mismatch),
        *_check_calibration(adapter),
    ]


def trained_with(adapters: Mapping[str, Adapter]) -> tuple[Mapping[str, Any], list[str]]:
    """How a set of adapters is to be asked, and warnings where its members differ: the predictor's
    word counts most, the summarizer's least."""
    known = [a for e in reversed(EXPERTS) if (a := adapters.get(e)) and a.trained_with]
    if not known:
        return {}, []
    first = known[0]
    return first.trained_with, [
        f"the {other.expert} adapter was trained with {dict(other.trained_with)}, the "
        f"{first.expert} with {dict(first.trained_with)}; they are asked as the latter was"
        for other in known[1:]
        if other.trained_with != first.trained_with
    ]


def _adapter(expert: str, folder: Path, calibrated: bool) -> Adapter:
    """The adapter in a directory, after a look at whether all of it is there."""
    if not folder.is_dir():
        raise ModelNotFoundError(f"no {expert} adapter: {folder} is not a directory")
    if not (folder / _CONFIG).is_file():
        raise ModelNotFoundError(f"no {expert} adapter: {folder} has no {_CONFIG}")
    config = read_json(folder / _CONFIG)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind.upper() != "LORA":
        raise ModelError(f"the {expert} adapter {folder} is no LoRA adapter but {kind!r}")
    if not (folder / _WEIGHTS).is_file():
        if (folder / _PICKLED).exists():
            raise ModelError(
                f"the {expert} adapter {folder} has only pickled weights ({_PICKLED}), which are "
                f"not loaded because they can run code; save it as {_WEIGHTS}"
            )
        raise ModelNotFoundError(f"no {expert} adapter: {folder} has no {_WEIGHTS}")
    if not tensor_shapes(folder / _WEIGHTS):
        raise ModelError(f"the {expert} adapter {folder} is empty: no tensors in {_WEIGHTS}")
    note = _note(folder, expert)
    names = (_CONFIG, _WEIGHTS, *([CALIBRATION_FILE] if calibrated else []), _NOTE)
    parts = [folder / name for name in names]
    calibration = None
    if expert == "predictor" and calibrated and (folder / CALIBRATION_FILE).is_file():
        calibration = Calibration.load(folder / CALIBRATION_FILE)
    return Adapter(
        expert=expert,
        path=folder,
        digest=digest_files(part for part in parts if part.is_file()),
        base_model=note.get("base_model") or config.get("base_model_name_or_path") or None,
        base_digest=note.get("base_digest") or None,
        prompt=note.get("prompt") or None,
        calibration=calibration,
        trained_with=note.get("trained_with") or {},
    )


def _note(folder: Path, expert: str) -> dict[str, Any]:
    """`r4r.json`, its fields checked; empty where there is none."""
    file = folder / _NOTE
    if not file.exists():
        return {}
    note = read_json(file)
    for name in ("expert", "base_model", "base_digest"):
        if not isinstance(note.get(name), str | None):
            raise ModelError(f"{file} is damaged: {name!r} is no text")
    prompt = note.get("prompt")
    if not isinstance(prompt, dict | None) or not isinstance((prompt or {}).get("digest", ""), str):
        raise ModelError(f"{file} is damaged: 'prompt' is no object with a digest")
    asked = note.get("trained_with") or {}
    if not isinstance(asked, dict) or not isinstance(asked.get("history", 0), int):
        raise ModelError(f"{file} is damaged: 'trained_with' has no number of reviews")
    if not isinstance(asked.get("budgets", {}), dict):
        raise ModelError(f"{file} is damaged: 'trained_with' has no budgets by name")
    if note.get("expert") not in (None, expert):
        raise ModelError(
            f"the {expert} adapter {folder} was trained as {note['expert']!r} (see {_NOTE}); "
            f"use it for that expert"
        )
    return note


def _check_base(adapter: Adapter, base: BaseModel) -> None:
    """Compare digests where both are known, else names."""
    if adapter.base_digest:
        if adapter.base_digest != base.digest:
            made_for = adapter.base_model or "a base model"
            raise AdapterMismatchError(
                f"the {adapter.expert} adapter {adapter.path} was made for {made_for} with digest "
                f"{adapter.base_digest}, not for {base.name} with digest {base.digest}; load that "
                "base model, or train the adapter again"
            )
        return
    known = {base.name, str(base.path), *base.aliases}
    if adapter.base_model and not _names([adapter.base_model]) & _names(known):
        noted = (adapter.path / _NOTE).exists() and read_json(adapter.path / _NOTE)
        file = _NOTE if noted and noted.get("base_model") else _CONFIG
        field = "base_model" if file == _NOTE else "base_model_name_or_path"
        raise AdapterMismatchError(
            f"the {adapter.expert} adapter {adapter.path} was made for base model "
            f"{adapter.base_model!r}, not for {base.name!r}; load that base model, or, if both "
            f"are the same under two names, set {field} to {base.name!r} in {file}"
        )


def _names(names: set[str] | list[str]) -> set[str]:
    """Each name and its last component, without regard to case."""
    trimmed = [name.strip().rstrip("/\\").casefold() for name in names]
    return {part for name in trimmed for part in (name, re.split(r"[/\\]", name)[-1])} - {""}


def _check_shapes(adapter: Adapter, base: BaseModel, shapes: Shapes) -> None:
    """Compare each LoRA matrix with the weight that it adapts, each whole weight with its own."""
    # A model with tied embeddings saves no lm_head.
    embeddings = next((s for n, s in shapes.items() if n.endswith("embed_tokens.weight")), None)
    transposed = bool(read_json(adapter.path / _CONFIG).get("fan_in_fan_out"))
    for tensor, shape in tensor_shapes(adapter.path / _WEIGHTS).items():
        name = tensor.removeprefix(_PREFIX).replace(".base_layer.", ".")
        lora = _LORA.fullmatch(name)
        if lora is None and _OTHER.fullmatch(name):
            continue
        weight = f"{lora['module']}.weight" if lora else name
        tied = embeddings if weight.endswith("lm_head.weight") else None
        wanted = shapes.get(weight, tied)
        if wanted is None:
            raise _misfit(adapter, base, tensor, f"the base has no weight {weight}")
        if lora is None:
            fits = shape == wanted
        elif len(wanted) != 2 or len(shape) != 2:
            continue
        else:
            # A is (rank, in) and B is (out, rank); linear weights are (out, in), embedding
            # tables (tokens, width), and those of Conv1D layers (in, out).
            flipped = transposed or bool(lora["embedding"])
            inner, outer = wanted if flipped else wanted[::-1]
            fits = shape[1] == inner if lora["side"] == "A" else shape[0] == outer
        if not fits:
            raise _misfit(adapter, base, tensor, f"its shape is {shape}, the base's {wanted}")


def _misfit(adapter: Adapter, base: BaseModel, tensor: str, why: str) -> AdapterMismatchError:
    made_for = f" (it was made for {adapter.base_model!r})" if adapter.base_model else ""
    return AdapterMismatchError(
        f"the {adapter.expert} adapter {adapter.path} does not fit base model {base.name!r}"
        f"{made_for}: {tensor}: {why}; load the base model that it was made for"
    )


def _check_prompt(adapter: Adapter, digest: str, allowed: bool) -> list[str]:
    """Compare the digests of the prompts; returns warnings."""
    who = f"the {adapter.expert} adapter {adapter.path}"
    trained = (adapter.prompt or {}).get("digest")
    if not trained:
        return [f"{who} does not say which prompt it was trained with"]
    if trained == digest:
        return []
    difference = (
        f"{who} was trained with another version of its prompt: digest {trained}, and here it is "
        f"{digest}"
    )
    if not allowed:
        raise PromptMismatchError(
            f"{difference}; use the prompt that it was trained with, train it again, or accept "
            "worse answers with allow_prompt_mismatch=True (--allow-prompt-mismatch)"
        )
    return [difference]


def _check_calibration(adapter: Adapter) -> list[str]:
    """Compare the weights with those that the calibration was fitted to; returns warnings."""
    facts = adapter.calibration.facts if adapter.calibration is not None else None
    if facts is None or facts.weights_digest in ("", file_digest(adapter.path / _WEIGHTS)):
        return []
    return [
        f"the {adapter.expert} adapter {adapter.path} was calibrated with other weights than it "
        f"has; calibrate it again, or remove {CALIBRATION_FILE}"
    ]
