"""Copies finished experts to where others load them from, without what only training needs.

    release(recipe, "experts/")

The copy holds no id of any user or item: the targets that an adapter learned from stay behind.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from finetune.settings import Recipe
from r4r_graph.calibration import CALIBRATION_FILE
from r4r_graph.engine.adapters import find_adapters
from r4r_graph.errors import InputError

FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "r4r.json",
    "README.md",
    "metrics.json",
    CALIBRATION_FILE,
)
"""What belongs to a released adapter, where it is there."""


@dataclass(frozen=True, slots=True)
class ReleaseReport:
    """What was copied."""

    folder: Path
    experts: tuple[str, ...]
    size: int
    """Bytes of all files together."""


def release(recipe: Recipe, out: str | os.PathLike[str]) -> ReleaseReport:
    """Copy the finished adapters of a recipe into the folder `out`, which
    `Recommender.load(adapters=out)` takes.

    Raises:
        ModelError: there are none, or one is damaged.
        InputError: `out` holds something already, or cannot be written.
    """
    found = find_adapters(recipe.adapters)
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InputError(f"{folder} is not empty: a release goes into a folder of its own")
        size = 0
        for expert, adapter in found.items():
            (folder / expert).mkdir()
            for name in FILES:
                if (adapter.path / name).is_file():
                    copy = Path(shutil.copyfile(adapter.path / name, folder / expert / name))
                    size += copy.stat().st_size
    except OSError as error:
        raise InputError(f"cannot release into {folder}: {error}") from error
    return ReleaseReport(folder, tuple(found), size)
