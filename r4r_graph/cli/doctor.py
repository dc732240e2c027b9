"""Checks what the library needs on this machine."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from r4r_graph.errors import R4RError

PACKAGES = (
    "langgraph",
    "langchain-core",
    "transformers",
    "peft",
    "torch",
    "outlines",
    "datasets",
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    works: bool
    detail: str
    mend: str = ""
    """How to mend it, where it does not work or could be better."""


def examine(base: str, adapters: str | None) -> list[Finding]:
    """Look at everything; nothing raises, and the base model is converted if that is still due."""
    return [*_versions(), _device(), *_models(base, adapters), _cache()]


def _versions() -> Iterator[Finding]:
    yield Finding("python", True, f"{platform.python_version()} at {sys.executable}")
    for package in PACKAGES:
        try:
            yield Finding(package, True, version(package))
        except PackageNotFoundError:
            yield Finding(package, False, "not installed", f"pip install {package}")


def _device() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of it cannot be loaded
        return Finding("device", False, f"torch cannot be imported: {error}", "pip install torch")
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return Finding("device", True, f"cuda ({name}), bfloat16 by default")
    return Finding("device", True, f"cpu, {torch.get_num_threads()} threads, float32 by default")


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
    except R4RError as error:
        return Finding("cache", False, "cannot be used", str(error))
    return Finding("cache", True, f"{folder}, {kept} summaries kept")
