"""Options that are left out on the command line are looked up: see `r4r_graph.configuration`.

They become click's defaults of each command's options, by name: an option of a new command that is
called like a setting is looked up without a word more.
"""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar
from typing import Any

import typer

from r4r_graph.configuration import Configuration, engine_settings, resolve

_log = logging.getLogger(__name__)

_AS_BEGUN = ("resume", "fork")
"""Commands that go on with a run as it began."""

_OTHERWISE = {("evaluate", "adapters")}
"""Options that mean something else than the setting of their name."""

_KNOBS = ("round_size", "sure", "temperature", "top_p", "timeout")
_LOADING = ("dtype", "quantize_4bit")
"""Settings that not every command has an option for, though they are meant for all."""

_NOTHING = Configuration()
_found: ContextVar[Configuration] = ContextVar("r4r_configuration", default=_NOTHING)


def configure(context: typer.Context) -> None:
    """Look all settings up, for the command that comes.

    Raises:
        SettingError: see `resolve`.
    """
    _found.set(_NOTHING)
    # Help is given, and the doctor says what is wrong, whatever is wrong.
    if context.invoked_subcommand in (None, "doctor") or "--help" in sys.argv:
        return
    found = resolve()
    found.use_cache_dir()
    if context.invoked_subcommand in _AS_BEGUN:
        return
    _found.set(found)
    commands: dict[str, Any] = context.command.commands  # type: ignore[attr-defined]
    context.default_map = {
        name: {
            param.name: getattr(found, param.name)
            for param in command.params
            if param.name in found.origins and (name, param.name) not in _OTHERWISE
        }
        for name, command in commands.items()
    }
    if ":" in found.engine and found.origin("engine").kind == "file":
        # Reviews go there, and a key: not without a word, where a folder's file says so.
        _log.warning("the engine is %s (%s)", found.engine, found.origin("engine"))


def configured() -> Configuration:
    """What was looked up for the command that runs."""
    return _found.get()


def further_knobs(given: dict[str, Any]) -> dict[str, Any]:
    """Knobs that were looked up and have no option here, beside those given."""
    looked_up = configured().knobs()
    more = {name: looked_up[name] for name in _KNOBS if name in looked_up}
    return {**more, **given}


def further_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Settings of `Recommender.load` that were looked up and have no option, beside those given."""
    found = configured()
    more = {name: getattr(found, name) for name in _LOADING if name in found.origins}
    whole = {**more, **given}
    engine = whole.pop("engine", None)
    if engine is not None and not isinstance(engine, str):
        return {**whole, "engine": engine}
    return {**whole, **engine_settings(engine or found.engine)}
