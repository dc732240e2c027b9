"""What a teacher's answers have cost, and the limit that they may."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from r4r_graph.answers import Answer
from r4r_graph.errors import TeacherError


@dataclass(frozen=True, slots=True)
class TokensSpent:
    """What a teacher has cost."""

    prompt: int
    """Tokens of this run's prompts."""
    completion: int
    """Tokens of this run's answers."""
    calls: int
    """Answers that were paid for in this run."""
    reused: int
    """Answers that were there already."""
    earlier: int = 0
    """Tokens of prompts and answers that earlier runs paid for; they count towards the limit."""

    @property
    def total(self) -> int:
        """All tokens, of this run and of earlier ones."""
        return self.prompt + self.completion + self.earlier


class TokenBudget:
    """Counts tokens, and lets a call begin only when it cannot pass the limit.

    A call under way is counted with the most it may cost. One that does not fit beside the others
    waits for them to end, so that their real cost decides.
    """

    def __init__(self, limit: int | None, earlier: int) -> None:
        self._limit = limit
        self._changed = threading.Condition()
        self._spent = TokensSpent(0, 0, 0, 0, earlier)
        self._reserved = 0
        self._closed = False

    @property
    def spent(self) -> TokensSpent:
        """What has been spent so far."""
        with self._changed:
            return self._spent

    def count_reused(self) -> None:
        """Count an answer that was there already."""
        with self._changed:
            self._spent = replace(self._spent, reused=self._spent.reused + 1)

    def close(self) -> None:
        """No call begins any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @contextmanager
    def reserved(self, most: int) -> Iterator[list[Answer]]:
        """Room for a call of at most `most` tokens; the caller puts the answer into the list.

        Raises:
            TeacherError: the limit is reached, or `close` was called.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._reserved or self._fits(most))
            if self._closed:
                raise TeacherError("the teacher is closed")
            if not self._fits(most):
                raise TeacherError(
                    f"the teacher's token limit is reached: {self._spent.total} tokens are spent, "
                    f"the next call may take {most}, and teacher.token_limit is {self._limit}; "
                    "raise it and start again to continue"
                )
            self._reserved += most
        bill: list[Answer] = []
        try:
            yield bill
        finally:
            with self._changed:
                self._reserved -= most
                was = self._spent
                self._spent = replace(
                    was,
                    prompt=was.prompt + sum(answer.prompt_tokens for answer in bill),
                    completion=was.completion + sum(answer.completion_tokens for answer in bill),
                    calls=was.calls + len(bill),
                )
                self._changed.notify_all()

    def _fits(self, most: int) -> bool:
        return self._limit is None or self._spent.total + self._reserved + most <= self._limit
