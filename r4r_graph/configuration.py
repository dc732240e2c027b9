"""What is loaded and how runs go, looked up: arguments, environment, a file, defaults.

    settings = resolve(base="models/mine")          # the rest from R4R_* and r4r.toml
    with settings.load() as recommender:
        recommender.rate("mara", "glass-harbour", **settings.knobs())

The file is the one that `R4R_CONFIG` names, else `r4r.toml` in the working directory, else the
table `[tool.r4r]` of a `pyproject.toml` there. `Recommender.load` looks nothing up: it takes
arguments alone. Keys of a model server come from the environment and are no part of this.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from r4r_graph.errors import R4RError, SettingError

if TYPE_CHECKING:
    from langgraph.store.base import BaseStore
    from langgraph.types import Checkpointer

    from r4r_graph.evidence import TokenBudgets
    from r4r_graph.recommender import Recommender

PREFIX = "R4R_"
FILE_VARIABLE = "R4R_CONFIG"
FILE_NAME = "r4r.toml"
TABLE = "tool.r4r"
"""Where the settings stand in a `pyproject.toml`."""

_PATHS = ("reviews", "items", "cache_dir")
_PATHS_OR_NAMES = ("base", "adapters")
_RUN = (
    *("history", "rationales", "round_size", "sure", "readout"),
    *("seed", "temperature", "top_p", "influence", "timeout"),
)
_KINDS = {
    **dict.fromkeys(("history", "rationales", "round_size", "seed"), "a whole number"),
    **dict.fromkeys(("sure", "temperature", "top_p", "timeout"), "a number"),
    **dict.fromkeys(("quantize_4bit", "allow_prompt_mismatch"), "true or false"),
}
_SWITCH = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}
_SECRET = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)

Kind = Literal["argument", "environment", "file", "default"]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from."""

    kind: Kind
    name: str = ""
    """The environment variable, or the file and its key."""
    over: tuple[str, ...] = ()
    """Where else it stood, and lost."""

    def __str__(self) -> str:
        return self.name or self.kind


@dataclass(frozen=True, slots=True)
class Configuration:
    """The settings, each with where it came from; made by `resolve`.

    A field's name is its key in the file, and in capitals behind `R4R_` its variable.
    """

    reviews: str | None = None
    """A file of reviews; None: every call brings its own histories."""
    items: str | None = None
    base: str = "smollm2-135m"
    """See `Recommender.load`; so for the next ones."""
    adapters: str | None = None
    engine: str = "local"
    """`local`; the address of a model server; a chat model as `provider:name`; or `fake`, an engine
    without a model."""
    scale: str = "1-5"
    device: str | None = None
    dtype: str | None = None
    quantize_4bit: bool = False
    allow_prompt_mismatch: bool = False
    budgets: str | None = None
    """As `review=224,side=256`; in a file also a table."""
    cache_dir: str | None = None
    """Where everything is kept; None: the platform's cache folder."""
    history: int | None = None
    """This and the rest are fields of `Knobs`."""
    rationales: int = 1
    round_size: int = 4
    sure: float = 0.9
    readout: str = "mean"
    seed: int = 0
    temperature: float = 0.8
    top_p: float = 0.95
    influence: str = "none"
    timeout: float | None = None
    origins: Mapping[str, Origin] = field(default_factory=lambda: MappingProxyType({}))
    """By setting; one that is not here has its default."""
    file: Path | None = None
    """The file that was read."""

    def origin(self, name: str) -> Origin:
        """Where a setting came from."""
        return self.origins.get(name, Origin("default"))

    def knobs(self) -> dict[str, Any]:
        """What was set of a run's knobs: keyword arguments of `Recommender.rate` and the like."""
        return {name: getattr(self, name) for name in _RUN if name in self.origins}

    def load(
        self, *, store: BaseStore | None = None, checkpointer: Checkpointer = None
    ) -> Recommender:
        """Load it all; `store` and `checkpointer` as for `Recommender.load`.

        A cache folder from an argument or a file holds for the whole process from now on.

        Raises:
            DataError, ModelError, SettingError: see `Recommender.load`.
        """
        from r4r_graph.recommender import Recommender

        self.use_cache_dir()
        engine = engine_settings(self.engine)
        if store is not None:
            engine["store"] = store
        return Recommender.load(
            self.reviews,
            self.items,
            self.base,
            self.adapters,
            scale=self.scale,
            device=self.device,
            dtype=self.dtype,
            quantize_4bit=self.quantize_4bit,
            allow_prompt_mismatch=self.allow_prompt_mismatch,
            budgets=parse_budgets(self.budgets),
            checkpointer=checkpointer,
            **engine,
        )

    def use_cache_dir(self) -> None:
        """Have the library keep everything in `cache_dir`, where it was set otherwise than by the
        variable, which the library reads itself."""
        from r4r_graph import caches

        if self.origin("cache_dir").kind in ("argument", "file"):
            caches.use_dir(self.cache_dir)


SETTINGS = tuple(f.name for f in fields(Configuration) if f.name not in ("origins", "file"))
"""All there are."""


def resolve(
    *, environ: Mapping[str, str] | None = None, folder: Path | None = None, **arguments: Any
) -> Configuration:
    """The settings: arguments first (None is not given), then the environment, then the file.

    Args:
        environ: the environment; default is the process's. An empty variable counts as unset.
        folder: where a file is looked for; default is the working directory.
        **arguments: fields of `Configuration`. Paths may be of any kind.

    Raises:
        SettingError: an unknown setting, a bad value, a file that cannot be read, or a key of a
            server in it. The message names the variable, or the file and the key.
    """
    environ = os.environ if environ is None else environ
    unknown = sorted(set(arguments) - set(SETTINGS))
    if unknown:
        raise SettingError(f"unknown setting {', '.join(unknown)}; there are: {_known()}")
    file, written = _file(environ, folder or Path.cwd())
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    for name in SETTINGS:
        given: list[tuple[Origin, Any]] = []
        if arguments.get(name) is not None:
            given.append((Origin("argument"), _argument(arguments[name])))
        if text := environ.get(variable(name)):
            given.append((Origin("environment", variable(name)), _from_text(name, text)))
        if name in written:
            given.append((Origin("file", f"{file}: {name}"), written[name]))
        if given:
            (origin, values[name]), *lost = given
            origins[name] = Origin(origin.kind, origin.name, tuple(str(o) for o, _ in lost))
    found = Configuration(**values, origins=MappingProxyType(origins), file=file)
    _check(found)
    return found


def load_configured(
    *, store: BaseStore | None = None, checkpointer: Checkpointer = None, **arguments: Any
) -> Recommender:
    """The recommender that arguments, environment and file describe: `resolve`, then `load`.

    Raises:
        SettingError: see `resolve`.
        DataError, ModelError: see `Recommender.load`.
    """
    return resolve(**arguments).load(store=store, checkpointer=checkpointer)


def engine_settings(engine: str | None) -> dict[str, Any]:
    """What `Recommender.load` takes for a value of the setting `engine`.

    The fake engine's summaries are kept in memory: they are no one's.
    """
    if engine == "fake":
        from langgraph.store.memory import InMemoryStore

        from r4r_graph.engine.fake import fake_engine

        return {"engine": fake_engine(), "store": InMemoryStore()}
    return {} if engine in (None, "local") else {"engine": engine}


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + name.upper()


def unknown_variables(environ: Mapping[str, str], known: tuple[str, ...] = ()) -> list[str]:
    """Variables that begin with `R4R_` and mean nothing, with what may have been meant.

    Args:
        environ: the environment.
        known: further names that mean something.
    """
    ours = {*map(variable, SETTINGS), FILE_VARIABLE, *known}
    strange = sorted(name for name in environ if name.startswith(PREFIX) and name not in ours)
    return [name + _meant(name, ours) for name in strange]


def parse_budgets(text: str | None, what: str = "budgets") -> TokenBudgets | None:
    """Token budgets from `review=224,side=256`; what is not named keeps its default.

    Raises:
        SettingError: an unknown budget, no number, or one too small.
    """
    from r4r_graph.evidence import TokenBudgets

    if text is None:
        return None
    budgets: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        if name not in TokenBudgets.__dataclass_fields__ or not number.isdecimal():
            known = ", ".join(TokenBudgets.__dataclass_fields__)
            raise SettingError(
                f"bad {what} {part.strip()!r}: write name=tokens, the names being {known}"
            )
        budgets[name] = int(number)
    return TokenBudgets(**budgets)


# The file ----------------------------------------------------------------------------------------


def _file(environ: Mapping[str, str], folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """The file, if there is one, and what it sets."""
    if named := environ.get(FILE_VARIABLE):
        path = (folder / Path(named).expanduser()).absolute()
        table = _read(path, f"{FILE_VARIABLE}: ")
        if path.name == "pyproject.toml":
            table = _tool_table(table, path)
        return path, _settings(table, path)
    path = folder / FILE_NAME
    if path.exists():
        return path, _settings(_read(path), path)
    path = folder / "pyproject.toml"
    # A pyproject.toml is no file of ours: one that is broken is its owner's affair.
    if path.is_file():
        try:
            table = _tool_table(_read(path), path)
        except SettingError:
            return None, {}
        if table:
            return path, _settings(table, path)
    return None, {}


def _read(path: Path, before: str = "") -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingError(f"{before}there is no configuration file {path}") from None
    except OSError as error:
        raise SettingError(
            f"{before}cannot read the configuration file {path}: {error.strerror}"
        ) from error
    except UnicodeDecodeError as error:
        raise SettingError(f"{before}the configuration file {path} is not UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingError(f"{before}the configuration file {path} is no TOML: {error}") from error


def _tool_table(whole: Mapping[str, Any], path: Path) -> dict[str, Any]:
    tools = whole.get("tool", {})
    table = tools.get("r4r", {}) if isinstance(tools, dict) else {}
    if not isinstance(table, dict):
        raise SettingError(f"{path}: {TABLE} must be a table")
    return table


def _settings(table: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What a file sets, checked by type; its paths start at its folder."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if key not in SETTINGS:
            if _SECRET.search(key):
                raise SettingError(
                    f"{path}: {key}: keys are read from the environment alone (R4R_API_KEY, or "
                    "the provider's own variable), for a file is copied, committed and shown; "
                    "take it out, and consider it known"
                )
            # The value of a strange key is never shown: who knows what it is.
            raise SettingError(
                f"{path}: unknown key {key}{_meant(key, SETTINGS)}; there are: {_known()}"
            )
        found[key] = _from_file(key, value, path)
    return found


def _from_file(name: str, value: Any, path: Path) -> Any:
    kind = _KINDS.get(name, "text")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if name == "scale" and isinstance(value, list) and value:
        return ",".join(map(str, value))
    if name == "budgets" and isinstance(value, dict):
        return ",".join(f"{part}={tokens}" for part, tokens in value.items())
    sound = {
        "a whole number": number and isinstance(value, int),
        "a number": number,
        "true or false": isinstance(value, bool),
        "text": isinstance(value, str) and bool(value),
    }[kind]
    if not sound:
        raise SettingError(f"{path}: bad {name} = {value!r}: must be {kind}")
    if name == "reviews" and "://" in value:
        from r4r_graph.reviews.addresses import without_password

        if without_password(value) != value:
            raise SettingError(
                f"{path}: reviews: a password is for the environment (PGPASSWORD, or R4R_REVIEWS "
                "with the whole address) or for .pgpass; take it out, and consider it known"
            )
        return value
    if name in _PATHS:
        return str(path.parent / Path(value).expanduser())
    if name in _PATHS_OR_NAMES and (there := path.parent / Path(value).expanduser()).is_dir():
        return str(there)
    return value


# Values ------------------------------------------------------------------------------------------


def _from_text(name: str, text: str) -> Any:
    """What an environment variable says."""
    kind = _KINDS.get(name)
    try:
        if kind == "a whole number":
            return int(text)
        if kind == "a number":
            return float(text)
        return _SWITCH[text.strip().lower()] if kind == "true or false" else text
    except (ValueError, KeyError):
        raise SettingError(f"bad {variable(name)} {text!r}: must be {kind}") from None


def _argument(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _check(found: Configuration) -> None:
    """Refuse what is out of range, and say where it came from."""
    from r4r_graph.ratings import RatingScale

    _told(found, "scale", lambda: RatingScale.parse(found.scale))
    _told(found, "engine", lambda: _check_engine(found.engine))
    _told(found, "budgets", lambda: parse_budgets(found.budgets))
    if knobs := found.knobs():
        from r4r_graph.graph.state import check_knobs

        for name, value in knobs.items():
            _told(found, name, lambda name=name, value=value: check_knobs({name: value}))  # type: ignore[misc]


def _told(found: Configuration, name: str, check: Callable[[], object]) -> None:
    if name not in found.origins:
        return
    try:
        check()
    except R4RError as error:
        origin = found.origin(name)
        where = "" if origin.kind == "argument" else f" (from {origin})"
        raise SettingError(f"{error}{where}") from error


def _check_engine(text: str) -> None:
    if text in ("local", "fake"):
        return
    if "://" in text:
        from r4r_graph.engine.server_api import server_root

        server_root(text)
    elif not all(text.partition(":")):
        raise SettingError(
            f"bad engine {text!r}: local, fake, the address of a model server "
            "(http://HOST:PORT), or a chat model as provider:name"
        )


def _known() -> str:
    return ", ".join(SETTINGS)


def _meant(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
