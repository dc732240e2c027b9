"""What every training run needs around it: its folder, its checkpoints, and errors with a way out.

A run keeps `run.json` (what it is), checkpoints and `metrics.jsonl` under `work/runs/STEP`. It goes
on from the last checkpoint that was written to its end, and only if it is the same run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from r4r_graph.caches import write_atomically
from r4r_graph.errors import MemoryExhaustedError, SettingError, TrainingError


def is_main_process(device: str) -> bool:
    """Whether this is the process that writes; under `accelerate launch` there are several."""
    return bool(_state(device).is_main_process)


def main_process_first(device: str) -> AbstractContextManager[None]:
    """The main process goes through the block before the others."""
    block: AbstractContextManager[None] = _state(device).main_process_first()
    return block


def process_count(device: str) -> int:
    """How many processes share the training."""
    return int(_state(device).num_processes)


def _state(device: str) -> Any:
    from accelerate import PartialState

    return PartialState(cpu=not device.startswith("cuda"))


def prepare_run(folder: Path, facts: dict[str, Any], *, resume: bool) -> Path | None:
    """Make a run's folder ready; returns the last whole checkpoint to go on from, if any.

    Raises:
        SettingError: the folder's checkpoints are of another run.
    """
    note = folder / "run.json"
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    if note.exists():
        earlier = json.loads(note.read_text(encoding="utf-8"))
        changed = sorted(key for key in facts if facts[key] != earlier.get(key))
        if changed:
            raise SettingError(
                f"{folder} holds checkpoints of another run (different: {', '.join(changed)}); "
                "start over with --no-resume, or choose another work folder"
            )
    else:
        write_atomically(note, json.dumps(facts, indent=2))
    return last_checkpoint(folder)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end: the trainer's state comes last."""
    found = [p for p in folder.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def weights_digest(model: Any) -> str:
    """A digest of everything that trains."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            digest.update(name.encode())
            raw = parameter.detach().to(torch.float32).cpu().contiguous()
            digest.update(raw.numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def training_errors(step: str, folder: Path, bar: Any) -> Iterator[None]:
    """Errors of libraries as errors of ours, with the way out."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryExhaustedError(
            f"{step}: memory ran out; lower micro_batch (the result stays the same), set "
            "gradient_checkpointing, lower history or the budgets, or set quantize_4bit"
        ) from error
    except Exception as error:
        if not is_write_error(error):
            raise
        raise TrainingError(
            f"{step}: cannot write to {folder}: {error}; free some space and call again, the run "
            "goes on from its last checkpoint"
        ) from error
    finally:
        if bar is not None:
            bar.close()


def is_write_error(error: Exception) -> bool:
    """Whether the disk is to blame; each library has its own way of saying so."""
    said = str(error)
    return isinstance(error, OSError) or any(
        words in said for words in ("No space left", "PytorchStreamWriter failed")
    )


@contextmanager
def third_party_warnings() -> Iterator[None]:
    """Without notes of libraries about each other, which nobody here can act on."""
    with warnings.catch_warnings():
        # PEFT 0.21 asks Transformers 5 for an attribute it has renamed.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        # A head that is tuned as a whole is meant to part from the embedding that it was tied to.
        warnings.filterwarnings("ignore", ".*`tie_word_embeddings=True` and a tied layer")
        # TRL 1.16 sets it by the name that Transformers 5.24 has replaced.
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
        yield
