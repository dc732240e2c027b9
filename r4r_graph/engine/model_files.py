"""The files of a model or adapter: which there are, the shapes in them, and their digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from r4r_graph.caches import digests_path, write_atomically
from r4r_graph.errors import ModelError, ModelNotFoundError, SettingError

WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_REMEMBERED = 1 << 20  # digests of files from this size (bytes) on are remembered


def weight_files(folder: Path) -> list[Path]:
    """The safetensors that Transformers would load from the directory `folder`, all present.

    Raises:
        ModelNotFoundError: there are none, or a part is missing.
        ModelError: there are only pickled weights, or the index is damaged.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / _INDEX).is_file():
        try:
            parts = set(read_json(folder / _INDEX)["weight_map"].values())
        except (KeyError, AttributeError):
            raise ModelError(f"{folder / _INDEX} is damaged: no weight_map") from None
        files = [folder / part for part in sorted(parts)]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ModelNotFoundError(f"{folder} lacks a part of the weights: {missing[0]}")
        return files
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise ModelError(
            f"{folder} has only pickled weights, which are not loaded because they can run code; "
            f"save the model as safetensors ({WEIGHTS})"
        )
    raise ModelNotFoundError(f"{folder} has no weights: neither {WEIGHTS} nor {_INDEX}")


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name to shape of each tensor in a safetensors file; reads its header alone.

    Raises:
        ModelError: it is no safetensors file, or is cut short.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= file.stat().st_size - 8:
                raise ValueError("no header")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        shapes = {name: tuple(map(int, tensor["shape"])) for name, tensor in header.items()}
        end = max((int(tensor["data_offsets"][1]) for tensor in header.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{file} is no readable safetensors file: {first_line(error)}") from error
    if file.stat().st_size != 8 + length + end:
        raise ModelError(f"{file} is damaged: not as long as its header says; fetch it again")
    return shapes


def digest_files(files: Iterable[Path]) -> str:
    """16 hex digits over the names and contents of `files`, in the order given."""
    whole = hashlib.blake2b(digest_size=8)
    for file in files:
        whole.update(f"{file.name}\0{file_digest(file)}\n".encode())
    return whole.hexdigest()


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`.

    Raises:
        ModelError: it cannot be read or holds no JSON object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} is damaged: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} is damaged: not a JSON object")
    return value


def file_digest(file: Path) -> str:
    """32 hex digits over a file's content; those of large files are remembered by size and time
    of change."""
    stat = file.stat()
    if stat.st_size < _REMEMBERED:
        return _hashed(file)
    stamp = [stat.st_size, stat.st_mtime_ns]
    key = str(file.resolve())
    memory = _remembered()
    known = memory.get(key)
    if isinstance(known, list) and known[:2] == stamp and isinstance(known[-1], str):
        return known[-1]
    digest = _hashed(file)
    with suppress(OSError, SettingError):  # hashing again next time is all that is lost
        # read again: hashing takes a while, and others write here
        memory = _remembered() | {key: [*stamp, digest]}
        write_atomically(digests_path(), json.dumps(memory, indent=1))
    return digest


def _remembered() -> dict[str, Any]:
    try:
        return read_json(digests_path())
    except (ModelError, SettingError):
        return {}


def _hashed(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, partial(hashlib.blake2b, digest_size=16)).hexdigest()


def first_line(error: BaseException) -> str:
    """An error in one short line."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
