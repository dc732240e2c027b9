"""One HTML file that needs nothing beside it and obeys nothing that is written in it.

All texts are escaped. A content security policy forbids every connection, and every script and
style but the page's own, which it names by their digests.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from r4r_graph.caches import write_atomically
from r4r_graph.errors import SettingError
from r4r_graph.ratings import RatingScale

_INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
"""Characters that are not seen but steer what is: controls, direction marks, half characters."""

_LONGEST_NAME = 160


def render(template: str, **values: Any) -> str:
    """A page of this folder's templates."""
    return _environment().get_template(template).render(**values)


def write_page(html: str, file: str | os.PathLike[str]) -> Path:
    """Write a page, atomically; the folder it goes into is made where it is missing.

    Raises:
        SettingError: it cannot be written.
    """
    path = Path(file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, html)
    except OSError as error:
        raise SettingError(f"cannot write {path}: {error.strerror or error}") from None
    return path


# What templates speak with -----------------------------------------------------------------------


def visible(value: Any) -> Any:
    """A text with its invisible characters named, as `‹U+202E›`; anything else as it is."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return _INVISIBLE.sub(lambda match: f"‹U+{ord(match[0]):04X}›", value)
    return value


def pretty_json(value: Any) -> str:
    """Indented JSON, its invisible characters as escapes."""
    text = json.dumps(value, indent=1, ensure_ascii=False, default=str)
    return _INVISIBLE.sub(lambda match: json.dumps(match[0])[1:-1], text)


def duration(seconds: float | None) -> str:
    """`340 ms`, `3.2 s`, `12 min 3 s`, `3 h 12 min`, `2 d 3 h`."""
    if seconds is None:
        return "–"
    if seconds < 0.001:
        return "<1 ms"
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    for unit, size, below, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60)):
        if seconds >= size:
            count, rest = divmod(int(seconds), size)
            return f"{count} {unit} {rest // part} {below}"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


def moment(unix: float | None, *, day: bool = False) -> str:
    """Unix seconds as a time of UTC, or as its day."""
    if unix is None:
        return "–"
    try:
        when = datetime.fromtimestamp(unix, UTC)
    except (OverflowError, ValueError, OSError):  # a year that no calendar here reaches
        return f"{unix:.0f} s"
    return f"{when:%Y-%m-%d}" if day else f"{when:%Y-%m-%d %H:%M:%S} UTC"


def short(name: str) -> str:
    """A name that anybody may have written, so that it does not fill the page."""
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def signed(number: float, digits: int = 2) -> str:
    """A number with its sign; what rounds to nothing has none."""
    text = f"{abs(number):.{digits}f}"
    if float(text) == 0:
        return text
    return ("+" if number > 0 else "−") + text


def percent(share: float) -> str:
    """A share of one."""
    return f"{100 * share:.1f} %"


def stars(rating: float, scale: RatingScale) -> float:
    """How much of five stars a rating fills, in per cent; a scale that goes below zero begins at
    its low end."""
    nothing = min(0.0, scale.low)
    return round(100 * (rating - nothing) / (scale.high - nothing), 2)


def end_name(node: str) -> str:
    """A node's name as it is drawn."""
    return {"__start__": "start", "__end__": "end"}.get(node, node)


def flat_model(card: Mapping[str, Any]) -> dict[str, Any]:
    """A model card (`Experts.model_card()`) as lines of name and value."""
    found: dict[str, Any] = {}
    for name, value in card.items():
        if isinstance(value, Mapping):
            single = {"adapters": "adapter", "prompts": "prompt"}.get(name, name)
            found |= {f"{expert}: {single}": inner for expert, inner in value.items()}
        else:
            found[name.replace("_", " ")] = value
    return found


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("r4r_graph", "debug"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = _part(environment, "page.css"), _part(environment, "page.js")
    environment.globals |= {
        "style": Markup(style),  # the project's own files
        "script": Markup(script),
        "style_digest": _digest(style),
        "script_digest": _digest(script),
        "made_by": f"r4r-graph {version('r4r-graph')}",
    }
    environment.filters |= {
        "duration": duration,
        "short": short,
        "moment": moment,
        "signed": signed,
        "percent": percent,
        "json": pretty_json,
    }
    environment.globals |= {"stars_filled": stars, "end_name": end_name}
    return environment


def _part(environment: jinja2.Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0].strip()


def _digest(text: str) -> str:
    """As a content security policy names a script or a style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
