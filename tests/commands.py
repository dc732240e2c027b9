"""What a command of `r4r` left, run in the tests' own process; see the fixture `r4r`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Done:
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The only line on stderr that is an error, without its beginning."""
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("r4r: error: ")]
        assert len(lines) == 1, self.err
        return lines[0].removeprefix("r4r: error: ")


R4r = Callable[..., Done]
