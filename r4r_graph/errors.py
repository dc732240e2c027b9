"""One exception tree; each error names the input at fault, the reason and the way out.

R4RError
├── InputError               something passed in is wrong; exit code 2 on the command line
│   ├── DataError            a file, a column, a row, a rating off the scale, a bad timestamp
│   ├── UnknownRunError      no run is kept under this thread id
│   ├── UnknownPairError     neither the user nor the item is known, and no history was passed
│   └── SettingError         an argument, a knob or an environment variable out of range
├── ModelError               the base model or an adapter cannot be used
│   ├── ModelNotFoundError   no such base model or adapter here
│   ├── AdapterMismatchError an adapter made for another base model
│   └── PromptMismatchError  an adapter trained on another version of a prompt
├── EngineError              a request that the engine could not serve
│   ├── RequestError         the request itself is at fault (too long, unknown adapter)
│   ├── EngineBusyError      the queue is full; retryable
│   └── EngineFailure        the forward pass failed
├── TrainingError            a step of `finetune` that cannot go on; what it has made is kept
│   ├── NotReadyError        an earlier step's result is missing
│   ├── DivergedError        the loss is no finite number
│   ├── MemoryExhaustedError memory of the device ran out; names the setting to lower
│   └── TeacherError         the teacher cannot be used, or its token limit is reached
│       └── AnswerError      the teacher kept failing on one row; recorded, the others go on
├── SourceError              a database of reviews cannot be reached or written; retryable
├── StorageError             what is to be kept cannot be written: disk full, no permission
├── RunPausedError           the run waits for a person's answer; it goes on when it is resumed
├── RunTimeoutError          the run took longer than it may; a kept one can be resumed
└── MissingExtraError        an optional dependency is not installed
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = [
    "AdapterMismatchError",
    "AnswerError",
    "DataError",
    "DivergedError",
    "EngineBusyError",
    "EngineError",
    "EngineFailure",
    "InputError",
    "MemoryExhaustedError",
    "MissingExtraError",
    "ModelError",
    "ModelNotFoundError",
    "NotReadyError",
    "PromptMismatchError",
    "R4RError",
    "RequestError",
    "RunPausedError",
    "RunTimeoutError",
    "SettingError",
    "SourceError",
    "StorageError",
    "TeacherError",
    "TrainingError",
    "UnknownPairError",
    "UnknownRunError",
    "is_retryable",
]


class R4RError(Exception):
    """Base of all errors raised on purpose by this library."""

    retryable = False
    """Whether the same call may succeed later, unchanged."""


class InputError(R4RError, ValueError):
    """Something that was passed in cannot be used."""


class DataError(InputError):
    """A file of reviews or items, or one of its rows, cannot be used."""


class UnknownPairError(InputError, LookupError):
    """Neither the user nor the item appears anywhere, and no history was passed."""


class UnknownRunError(InputError, LookupError):
    """No run is kept under this thread id."""


class SettingError(InputError):
    """An argument or setting is out of its range."""


class ModelError(R4RError):
    """The base model or an adapter cannot be used."""


class ModelNotFoundError(ModelError, LookupError):
    """No such base model or adapter on this machine."""


class AdapterMismatchError(ModelError):
    """The adapter was made for another base model."""


class PromptMismatchError(ModelError):
    """The adapter was trained on another version of its expert's prompt."""


class EngineError(R4RError):
    """The engine could not serve a request."""


class RequestError(EngineError, ValueError):
    """The request itself is at fault: too long, an unknown adapter, an empty prompt."""


class EngineBusyError(EngineError):
    """The engine's queue stayed full for too long."""

    retryable = True


class EngineFailure(EngineError):
    """The forward pass failed for this request."""


class TrainingError(R4RError):
    """A step of `finetune` cannot go on; what it has made so far is kept."""


class NotReadyError(TrainingError):
    """An earlier step's result is missing."""


class DivergedError(TrainingError):
    """The loss is no finite number; nothing was saved of it."""


class MemoryExhaustedError(TrainingError):
    """Memory ran out; the message names the setting to lower."""


class TeacherError(TrainingError):
    """The teacher cannot be used, or its token limit is reached."""


class AnswerError(TeacherError):
    """The teacher kept failing on one row."""


class SourceError(R4RError):
    """A database of reviews cannot be reached, asked or written at present."""

    retryable = True


class StorageError(R4RError):
    """What is to be kept cannot be written, such as on a full disk; what is there already stays."""


class RunPausedError(R4RError):
    """The run waits for a person; nothing is lost. `question` says what is asked, and
    `thread_id` under which thread it goes on."""

    def __init__(self, question: Mapping[str, Any], thread_id: str) -> None:
        answers = " or ".join(map(repr, question.get("answers", ())))
        super().__init__(
            f"run {thread_id} waits for a person's answer about the {question.get('about')}: "
            f"resume it with {answers}"
        )
        self.question = question
        self.thread_id = thread_id


class RunTimeoutError(R4RError, TimeoutError):
    """The run took longer than its time limit. What it had asked of the engine is taken back. Where
    a checkpointer keeps it, it can be resumed: from its last step, with all its time."""

    def __init__(self, seconds: float, step: str) -> None:
        super().__init__(
            f"the run was not done after {seconds:g} s (timeout={seconds:g}), in its step {step}: "
            "give it more time, or fewer rationales, or a shorter history; a kept run goes on "
            "when it is resumed"
        )
        self.seconds = seconds
        self.step = step


class MissingExtraError(R4RError, ImportError):
    """An optional dependency is missing; the message holds the install command."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an extra: pip install 'r4r-graph[{extra}]'")


def is_retryable(error: BaseException) -> bool:
    """Whether a retry of the same call may succeed (used by the graph's retry policy)."""
    return isinstance(error, R4RError) and error.retryable
