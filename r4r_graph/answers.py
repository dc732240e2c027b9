"""What a chat model has answered, kept on disk the moment it arrives: it was paid for."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from r4r_graph.caches import open_summary_store
from r4r_graph.errors import R4RError, SettingError


@dataclass(frozen=True, slots=True)
class Answer:
    """What a chat model said, and what it cost."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    reused: bool
    """Whether it was paid for earlier, or by another call of this run."""


class AnswersFile:
    """Paid answers by key, in an SQLite file. Serves any number of threads.

    Every method raises `failure` when the file cannot be read or written any more: what cannot be
    kept must not be paid for.
    """

    def __init__(self, path: Path, role: str, *, failure: type[R4RError] = SettingError) -> None:
        """Open or make it (mode 0600).

        Args:
            path: the file.
            role: whose answers it keeps, such as `teacher`; another role's are not looked at.
            failure: see the class.

        Raises:
            SettingError: it cannot be used.
        """
        self._namespace = (role, "answers")
        self._name = f"{path}, the file of the {role}'s answers"
        self._failure = failure
        try:
            self._store = open_summary_store(path)
            self._store.conn.execute("PRAGMA synchronous = FULL")  # they cost money
        except (SettingError, sqlite3.Error) as error:
            raise SettingError(f"cannot use {self._name}: {error.__cause__ or error}") from None

    def get(self, key: str) -> Answer | None:
        """What was answered under this key."""
        with self._guarded():
            item = self._store.get(self._namespace, key)
        return None if item is None else Answer(**item.value, reused=True)

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer; once this returns, a killed process has not lost it."""
        value = asdict(answer)
        del value["reused"]
        with self._guarded():
            self._store.put(self._namespace, key, value, index=False)

    def tokens(self) -> int:
        """Of all answers and their prompts."""
        with self._guarded(), self._store.lock:
            rows = self._store.conn.execute(
                "SELECT CAST(value AS TEXT) FROM store WHERE prefix = ?",
                (".".join(self._namespace),),
            )
            values = [json.loads(value) for (value,) in rows]
        return sum(value["prompt_tokens"] + value["completion_tokens"] for value in values)

    def close(self) -> None:
        """Close the file."""
        self._store.conn.close()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._failure(f"cannot read or write {self._name}: {error}") from error
