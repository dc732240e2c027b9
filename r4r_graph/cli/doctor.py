"""Checks what the library needs on this machine."""

from __future__ import annotations

import os
import platform
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from r4r_graph.configuration import (
    FILE_NAME,
    SETTINGS,
    Configuration,
    resolve,
    unknown_variables,
)
from r4r_graph.errors import R4RError, SettingError

PACKAGES = (
    "langgraph",
    "langchain-core",
    "transformers",
    "peft",
    "torch",
    "outlines",
    "datasets",
)

_SERVER_SECONDS = 10.0
_WIDEST = 32  # columns of the table of settings


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    works: bool
    detail: str
    mend: str = ""
    """How to mend it, where it does not work or could be better."""


def look_up(**arguments: Any) -> tuple[Configuration, list[Finding]]:
    """The settings, and what is amiss with them; then those that the arguments alone give."""
    try:
        return resolve(**arguments), []
    except SettingError as error:
        amiss = Finding("settings", False, "cannot be used; looked at without them", str(error))
        return resolve(environ={}, folder=Path(os.devnull), **arguments), [amiss]


def examine(found: Configuration) -> list[Finding]:
    """Look at everything; nothing raises, and the base model is converted if that is still due."""
    found.use_cache_dir()
    return [
        *_versions(),
        _device(found),
        *_environment(found),
        *(_models(found.base, found.adapters) if found.engine == "local" else [_engine(found)]),
        _cache(),
        _runs(),
    ]


def settings_rows(found: Configuration) -> list[dict[str, Any]]:
    """Each setting: its value, where that came from, and what else was set and lost."""
    return [
        {
            "name": name,
            "value": getattr(found, name),
            "from": str(found.origin(name)),
            "over": list(found.origin(name).over),
        }
        for name in SETTINGS
    ]


def show_settings(found: Configuration, out: Console) -> None:
    """The same as a table; what is longer than its column shifts the rest of its line."""
    rows = [("setting", "value", "from")]
    for row in settings_rows(found):
        lost = f" (over {', '.join(row['over'])})" if row["over"] else ""
        value = "-" if row["value"] is None else str(row["value"])
        rows.append((row["name"], value, row["from"] + lost))
    names, values = (max(min(len(row[i]), _WIDEST) for row in rows) for i in (0, 1))
    out.print()
    for i, (name, value, origin) in enumerate(rows):
        style = "bold" if i == 0 else "dim" if origin == "default" else ""
        line = f"{name:<{names}}  {value:<{values}}  {origin}"
        out.print(Text(line, style=style), soft_wrap=True)


def _versions() -> Iterator[Finding]:
    yield Finding("python", True, f"{platform.python_version()} at {sys.executable}")
    for package in PACKAGES:
        try:
            yield Finding(package, True, version(package))
        except PackageNotFoundError:
            yield Finding(package, False, "not installed", f"pip install {package}")


def _device(found: Configuration) -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of it cannot be loaded
        return Finding("device", False, f"torch cannot be imported: {error}", "pip install torch")
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return Finding("device", True, f"cuda ({name}), bfloat16 by default")
    dtype = f"{found.dtype} as set" if found.dtype else "float32 by default"
    native = has_bfloat16()
    able = "computes bfloat16 natively" if native else "no native bfloat16"
    faster = native and found.dtype is None
    return Finding(
        "device",
        True,
        f"cpu, {torch.get_num_threads()} threads, {dtype}, {able}",
        "--dtype bfloat16 (R4R_DTYPE) about halves the time of reading prompts" if faster else "",
    )


def has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 (AVX-512 BF16, AMX, or those of Arm)."""
    import torch

    # Of torch 2.10 and later; before, nothing is said.
    ask: Any = getattr(torch.cpu, "get_capabilities", dict)
    able = ask()
    return any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _environment(found: Configuration) -> Iterator[Finding]:
    from r4r_graph.engine.server_api import KEYS

    nothing = f"none ({FILE_NAME} in the working directory, or the one R4R_CONFIG names)"
    yield Finding("settings file", True, nothing if found.file is None else str(found.file))
    told = ", ".join(f"{name} {'set' if os.environ.get(name) else 'not set'}" for name in KEYS)
    yield Finding("keys of a model server", True, told)
    for name in unknown_variables(os.environ, known=KEYS):
        yield Finding("variable", True, f"{name} means nothing here", "mend its name, or unset it")


def _engine(found: Configuration) -> Finding:
    """An engine that is no local model: a server is asked what it serves; a hosted chat model is
    not, since each of its answers costs."""
    if "://" not in found.engine:
        detail = "without a model" if found.engine == "fake" else "a chat model, not asked"
        return Finding("engine", True, f"{found.engine}, {detail}")
    from r4r_graph.engine.server_connect import open_server_engine
    from r4r_graph.prompts import prompt_digests

    try:
        engine, warnings = open_server_engine(
            found.engine,
            found.base,
            found.adapters,
            prompts=prompt_digests(),
            allow_prompt_mismatch=found.allow_prompt_mismatch,
            timeout=_SERVER_SECONDS,
            attempts=1,
        )
    except R4RError as error:
        return Finding("engine", False, found.engine, str(error))
    with engine:
        adapters = ", ".join(engine.info.adapters) or "none"
        detail = f"{found.engine} serves {engine.info.base}, adapters: {adapters}"
        return Finding("engine", True, detail, "; ".join(warnings))


def _models(base: str, adapters: str | None) -> Iterator[Finding]:
    from r4r_graph.engine.adapters import EXPERTS, check_adapter, find_adapters
    from r4r_graph.engine.weights import find_base
    from r4r_graph.prompts import prompt_digests

    try:
        model = find_base(base)
        yield Finding("base model", True, f"{model.name} ({model.digest}) in {model.path}")
    except R4RError as error:
        yield Finding("base model", False, base, str(error))
        return
    try:
        found = find_adapters(adapters, model)
    except R4RError as error:
        yield Finding("adapters", False, str(adapters), str(error))
        return
    for expert in EXPERTS:
        if expert not in found:
            yield Finding(
                f"adapter {expert}",
                True,
                "none: the base model answers untrained",
                "pass --adapters DIR with a trained one",
            )
            continue
        try:
            notes = check_adapter(found[expert], model, prompt_digests()[expert])
            place = f"{found[expert].path} ({found[expert].digest})"
            yield Finding(f"adapter {expert}", True, place, "; ".join(notes))
        except R4RError as error:
            yield Finding(f"adapter {expert}", False, str(found[expert].path), str(error))


def _cache() -> Finding:
    from r4r_graph import caches

    try:
        folder = caches.cache_dir()
        store = caches.open_summary_store()
        store.conn.close()
        kept = caches.count_summaries()
        size = sum(entry.bytes for entry in caches.cache_info())
    except R4RError as error:
        return Finding("cache", False, "cannot be used", str(error))
    return Finding("cache", True, f"{folder}, {kept} summaries kept, {size / 1e6:.1f} MB in all")


def _runs() -> Finding:
    from r4r_graph import caches

    try:
        path = caches.runs_path()
        kept = _count_runs() if path.exists() else 0
    except R4RError as error:
        return Finding("kept runs", False, "cannot be read", str(error))
    return Finding("kept runs", True, f"{kept} in {path}")


def _count_runs() -> int:
    """Runs that are kept; reads only."""
    from r4r_graph import caches

    path = caches.runs_path()
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=30)) as opened:
            table = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'checkpoints'"
            if not opened.execute(table).fetchone():
                return 0
            # Not counted: checkpoints of subgraphs, which have a namespace.
            query = "SELECT count(DISTINCT thread_id) FROM checkpoints WHERE checkpoint_ns = ''"
            return int(opened.execute(query).fetchone()[0])
    except sqlite3.Error as error:
        raise caches.unusable(path, "kept runs", error) from error
