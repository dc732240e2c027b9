"""Our own experts at work within the pipeline: the engine they answer with, their jobs' rows."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.settings import Recipe
from r4r_graph.engine.adapters import find_adapters
from r4r_graph.engine.base import Engine
from r4r_graph.engine.weights import find_base
from r4r_graph.errors import NotReadyError, TrainingError
from r4r_graph.jobs import Columns, read_job
from r4r_graph.prompts import prompt_digests, prompt_info

_log = logging.getLogger(__name__)


class ExpertEngine:
    """The engine that an expert of this pipeline answers with, loaded when it is first asked for:
    a job that is done already needs none.

    Args:
        recipe: base model, device, precision.
        expert: summarizer, reasoner or predictor.
        folder: its adapter. Without one the base model answers alone, which is said in the log.
        engine: to be used instead of loading one; it stays open.

    Raises:
        ModelError: the base model or the adapter is not there, or they do not fit each other.
    """

    def __init__(self, recipe: Recipe, expert: str, folder: Path, engine: Engine | None) -> None:
        self._recipe = recipe
        self._expert = expert
        self._folder = folder if folder.is_dir() else None
        self._given = engine
        self._loaded: Engine | None = None

    def __enter__(self) -> ExpertEngine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._loaded is not None:
            self._loaded.close()

    @property
    def facts(self) -> dict[str, Any]:
        """What decides its answers: base, adapter and prompt, by their digests."""
        if self._given is not None:
            info = self._given.info
            base, adapter = info.digest, info.adapters.get(self._expert)
        else:
            base = find_base(self._recipe.base).digest
            found = find_adapters({self._expert: self._folder}, calibrated=False)
            adapter = found[self._expert].digest if found else None
        prompt = prompt_info(self._expert).digest
        return {
            "base": base,
            "adapter": adapter,
            "prompt": prompt,
            "quantize_4bit": self._recipe.quantize_4bit,
        }

    @property
    def engine(self) -> Engine:
        """The engine."""
        if self._given is not None:
            return self._given
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def _load(self) -> Engine:
        from r4r_graph.engine.local import load_local_engine

        recipe = self._recipe
        if self._folder is None:
            _log.warning("no adapter for the %s yet: the base model answers alone", self._expert)
        if recipe.threads is not None:
            import torch

            torch.set_num_threads(recipe.threads)
        engine, notes = load_local_engine(
            recipe.base,
            {self._expert: self._folder},
            device=recipe.device,
            dtype=recipe.dtype,
            quantize_4bit=recipe.quantize_4bit,
            prompts=prompt_digests(),
            calibrated=False,
        )
        for note in notes:
            _log.warning(note)
        return engine


def finished_rows(folder: Path, step: str) -> list[Columns]:
    """The rows of a job that has ended.

    Raises:
        NotReadyError: it has not begun, or it was stopped.
    """
    note = folder / "_job.json"
    if not note.is_file():
        raise NotReadyError(f"{folder} holds no results; run the step `{step}` first")
    wanted = json.loads(note.read_text(encoding="utf-8"))["rows"]
    rows = read_job(folder) if any(folder.glob("part-*.parquet")) else []
    if len(rows) < wanted:
        raise NotReadyError(
            f"{folder} holds {len(rows)} of {wanted} rows; run the step `{step}` again to go on"
        )
    return rows


def refuse_all_failed(rows: Sequence[Mapping[str, Any]], folder: Path) -> int:
    """How many rows of a job failed.

    Raises:
        TrainingError: all of them.
    """
    errors = [row["error"] for row in rows if row["error"] is not None]
    if errors and len(errors) == len(rows):
        raise TrainingError(
            f"every row of {folder} failed, the first with: {errors[0]}; mend that, delete the "
            "folder and start again"
        )
    return len(errors)
