"""Addresses of databases, told from paths, and shown without their password."""

from __future__ import annotations

import os
import re


def is_address(where: str | os.PathLike[str]) -> bool:
    """Whether it is the address of a database, and no path."""
    return isinstance(where, str) and re.match(r"[\w+]+://", where) is not None


def without_password(address: str) -> str:
    """An address as it may be shown and written down; a path stays as it is."""
    if not is_address(address):
        return address
    bare = re.sub(r"(?<=://)([^:/]*):.*@", r"\1@", address, flags=re.DOTALL)
    return re.sub(r"(?<=[?&])password=[^&]*&?", "", bare)
