"""Arguments first, then the environment, then a file, then the default; and who said what."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from r4r_graph import caches
from r4r_graph.configuration import (
    SETTINGS,
    Configuration,
    load_configured,
    parse_budgets,
    resolve,
    unknown_variables,
    variable,
)
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.errors import DataError, SettingError
from r4r_graph.graph import Knobs
from r4r_graph.recommender import Recommender
from tests.commands import R4r
from tests.scripted import Script, at, review

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A working directory without a file, and no cache folder of an earlier test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(caches, "_told", None)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes the file in the working directory, or another one."""

    def written(text: str, name: str = "r4r.toml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return written


def found(environ: Mapping[str, str] | None = None, **arguments: Any) -> Configuration:
    return resolve(environ=environ or {}, **arguments)


# Who wins --------------------------------------------------------------------------------------


def test_without_anything_all_is_default() -> None:
    nothing = found()
    assert nothing == Configuration()
    assert {str(nothing.origin(name)) for name in SETTINGS} == {"default"}
    assert nothing.knobs() == {}


def test_defaults_are_those_of_the_library() -> None:
    """Said twice, so that looking up needs no LangGraph; and the same twice."""
    ours = {f.name: f.default for f in fields(Configuration)}
    theirs = {f.name: f.default for f in fields(Knobs)}
    shared = ours.keys() & theirs.keys()
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}
    assert theirs.keys() - shared == {"ask", "ask_below", "record"}
    load = Recommender.load.__func__.__kwdefaults__  # type: ignore[attr-defined]
    for name in ("scale", "device", "dtype", "quantize_4bit", "allow_prompt_mismatch", "budgets"):
        assert ours[name] == load[name]


def test_arguments_beat_the_environment_which_beats_the_file(write: Write) -> None:
    file = write('base = "filed"\nadapters = "none"\nscale = "1-10"\n')
    environ = {"R4R_BASE": "exported", "R4R_ADAPTERS": "set"}
    whole = found(environ, base="argued")
    assert (whole.base, whole.adapters, whole.scale, whole.seed) == ("argued", "set", "1-10", 0)
    assert whole.file == file
    base, adapters, scale = map(whole.origin, ("base", "adapters", "scale"))
    assert (base.kind, base.over) == ("argument", ("R4R_BASE", f"{file}: base"))
    assert (str(adapters), adapters.over) == ("R4R_ADAPTERS", (f"{file}: adapters",))
    assert (str(scale), scale.over) == (f"{file}: scale", ())
    assert whole.origin("seed").kind == "default"


def test_none_is_not_given_and_an_empty_variable_is_unset(write: Write) -> None:
    write('base = "filed"')
    assert found({"R4R_BASE": ""}, base=None).base == "filed"


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_can_be_set_in_each_place(name: str, write: Write) -> None:
    sound: dict[str, Any] = {
        **{"history": 3, "rationales": 2, "round_size": 2, "sure": 0.5, "readout": "mode"},
        **{"seed": 7, "temperature": 0.5, "top_p": 0.5, "influence": "same", "scale": "1-7"},
        **{"quantize_4bit": True, "allow_prompt_mismatch": True, "budgets": "side=99"},
        **{"engine": "fake", "timeout": 2.5},
    }
    value = sound.get(name, "text")
    assert getattr(found(**{name: value}), name) == value
    text = str(value).lower() if isinstance(value, bool) else str(value)
    assert getattr(found({variable(name): text}), name) == value
    write(f"{name} = {json.dumps(value)}")
    here = getattr(found(), name)
    assert here == value or Path(here).name == value


# The file --------------------------------------------------------------------------------------


def test_its_paths_start_at_its_folder(write: Write, tmp_path: Path) -> None:
    write("", "conf/models/mine/config.json")
    file = write(
        'reviews = "data/r.csv"\nitems = "/items.csv"\ncache_dir = "cache"\n'
        'base = "models/mine"\nadapters = "none"\n',
        "conf/mine.toml",
    )
    whole = found({"R4R_CONFIG": "conf/mine.toml"})
    folder = tmp_path / "conf"
    assert whole.file == file
    assert whole.reviews == str(folder / "data" / "r.csv")
    assert (whole.items, whole.cache_dir) == ("/items.csv", str(folder / "cache"))
    assert (whole.base, whole.adapters) == (str(folder / "models" / "mine"), "none")


def test_budgets_and_scale_in_tomls_own_words(write: Write) -> None:
    write("scale = [0.5, 1, 1.5]\n[budgets]\nside = 99\nreview = 40\n")
    whole = found()
    assert whole.scale == "0.5,1,1.5"
    budgets = parse_budgets(whole.budgets)
    assert budgets is not None
    assert (budgets.side, budgets.review) == (99, 40)


def test_a_pyproject_serves_too_but_after_ones_own_file(write: Write) -> None:
    project = write('[project]\nname = "x"\n[tool.r4r]\nseed = 4\n', "pyproject.toml")
    assert (found().seed, found().file) == (4, project)
    assert found({"R4R_CONFIG": "pyproject.toml"}).seed == 4
    own = write("seed = 5")
    assert (found().seed, found().file) == (5, own)


@pytest.mark.parametrize("text", ["[project]\nname = 'x'\n", "no toml at all ["])
def test_another_projects_pyproject_is_left_alone(write: Write, text: str) -> None:
    write(text, "pyproject.toml")
    assert found() == Configuration()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("reveiws = 'x'", r"r4r\.toml: unknown key reveiws \(did you mean reviews\?\); there are"),
        ("base = 5", r"r4r\.toml: bad base = 5: must be text"),
        ("base = ''", "bad base = '': must be text"),
        ("seed = 1.5", r"r4r\.toml: bad seed = 1.5: must be a whole number"),
        ("seed = true", "bad seed = True: must be a whole number"),
        ("sure = '0.5'", "bad sure = '0.5': must be a number"),
        ("quantize_4bit = 'yes'", "bad quantize_4bit = 'yes': must be true or false"),
        ("rationales = 0", r"rationales=0: must be .* \(from .*r4r\.toml: rationales\)"),
        ("readout = 'best'", r"readout='best': .* \(from .*r4r\.toml: readout\)"),
        ("scale = 'five'", r"scale 'five'.* \(from .*r4r\.toml: scale\)"),
        ("budgets = 'stars=9'", r"bad budgets 'stars=9'.* \(from .*r4r\.toml: budgets\)"),
        ("[budgets]\nside = 'x'", "bad budgets 'side=x'"),
        ("engine = 'vllm'", "bad engine 'vllm': local, fake, the address of a model server"),
        ("engine = 'ftp://host'", "bad engine address"),
        ("engine = 'openai:'", "bad engine 'openai:'"),
        ("base = \n", r"r4r\.toml is no TOML: .*line 1"),
        ("[run]\nseed = 1", "unknown key run"),
    ],
)
def test_a_bad_file_is_named_with_its_key(write: Write, text: str, reason: str) -> None:
    write(text)
    with pytest.raises(SettingError, match=reason):
        found()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"R4R_CONFIG: there is no configuration file .*gone"):
        found({"R4R_CONFIG": "gone.toml"})
    with pytest.raises(SettingError, match=r"cannot read the configuration file"):
        found({"R4R_CONFIG": str(tmp_path)})
    (tmp_path / "r4r.toml").write_bytes(b"base = '\xff'")
    with pytest.raises(SettingError, match=r"r4r\.toml is not UTF-8"):
        found()


@pytest.mark.parametrize("key", ["api_key", "OPENAI_API_KEY", "hf_token", "password"])
def test_a_key_in_the_file_is_refused_and_never_shown(write: Write, key: str) -> None:
    write(f"{key} = 'sk-canary-93'")
    with pytest.raises(SettingError, match=rf"{key}: keys are read from the environment") as bad:
        found()
    assert "canary" not in str(bad.value)


@pytest.mark.parametrize("address", ["http://me:sk-canary-93@host", "http://host?key=sk-canary-93"])
def test_a_key_in_an_address_is_refused_and_never_shown(address: str) -> None:
    with pytest.raises(SettingError, match="R4R_API_KEY") as bad:
        found({"R4R_ENGINE": address})
    assert "canary" not in str(bad.value)


# The environment and arguments -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("Yes", True), ("off", False), ("false", False)]
)
def test_switches_have_words(text: str, value: bool) -> None:
    assert found({"R4R_QUANTIZE_4BIT": text}).quantize_4bit is value


@pytest.mark.parametrize(
    ("environ", "reason"),
    [
        ({"R4R_SEED": "seven"}, "bad R4R_SEED 'seven': must be a whole number"),
        ({"R4R_QUANTIZE_4BIT": "maybe"}, "bad R4R_QUANTIZE_4BIT 'maybe': must be true or false"),
        ({"R4R_SURE": "2"}, r"sure=2.0.*\(from R4R_SURE\)"),
    ],
)
def test_a_bad_variable_is_named(environ: dict[str, str], reason: str) -> None:
    with pytest.raises(SettingError, match=reason):
        found(environ)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(SettingError, match="unknown setting bass; there are: reviews"):
        found(bass="x")
    with pytest.raises(SettingError, match=r"rationales=0: must be a whole number, 1 to 256$"):
        found(rationales=0)


def test_strange_variables_are_told_of() -> None:
    environ = {"R4R_BASSE": "x", "R4R_BASE": "x", "R4R_API_KEY": "x", "PATH": "x"}
    assert unknown_variables(environ, known=("R4R_API_KEY",)) == [
        "R4R_BASSE (did you mean R4R_BASE?)"
    ]


# Loading ---------------------------------------------------------------------------------------


def reviews_file(write: Write) -> Path:
    rows = [review("ann", "folk", 1, 3), review("ben", "target", 2, 2)]
    return write("\n".join(json.dumps(row.to_dict()) for row in rows), "reviews.jsonl")


def test_what_was_looked_up_is_loaded(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    reviews_file(write)
    write('engine = "fake"\nreviews = "reviews.jsonl"\nscale = "1-10"\nrationales = 2\n')
    monkeypatch.setenv("R4R_READOUT", "mode")
    settings = resolve()
    assert settings.knobs() == {"rationales": 2, "readout": "mode"}
    with settings.load() as recommender:
        result = recommender.rate("ann", "target", as_of=at(9), **settings.knobs())
        assert len(result.distribution.probabilities) == 10
        assert (len(result.rationales), result.readout) == (2, "mode")
    with load_configured(scale="1-9") as recommender:
        assert recommender.experts.scale.high == 9


def test_load_itself_looks_nothing_up(
    write: Write, monkeypatch: pytest.MonkeyPatch, fake: Callable[..., BatchingEngine]
) -> None:
    write('scale = "1-10"')
    monkeypatch.setenv("R4R_REVIEWS", "absent.csv")
    recommender = Recommender.load(engine=fake())
    assert (recommender.experts.scale.high, recommender.reviews) == (5, None)


def test_an_argument_names_the_cache_folder(write: Write, tmp_path: Path) -> None:
    write('engine = "fake"\ncache_dir = "filed"')
    before = caches.cache_dir()
    resolve().load().close()
    assert caches.cache_dir() == before  # the variable, which tests set, beats the file
    load_configured(cache_dir=tmp_path / "argued").close()
    assert caches.cache_dir() == tmp_path / "argued"


# The command line ------------------------------------------------------------------------------

PAIR = ("--user", "ann", "--item", "target", "--as-of", str(at(9)), "--json")


def test_the_command_line_looks_up_what_is_left_out(
    r4r: R4r, script: Script, write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reviews_file(write)
    file = write('reviews = "reviews.jsonl"\nscale = "1-9"\nrationales = 2\ncache_dir = "kept"\n')
    monkeypatch.delenv("R4R_CACHE_DIR")
    script.weights = lambda request: [1.0] * len(request.scale.values)
    told = json.loads(r4r("rate", *PAIR).out)
    assert (len(told["distribution"]), len(told["rationales"])) == (9, 2)
    assert (tmp_path / "kept" / "runs.sqlite").is_file()
    monkeypatch.setenv("R4R_SCALE", "1-10")
    assert len(json.loads(r4r("rate", *PAIR).out)["distribution"]) == 10
    told = json.loads(r4r("rate", *PAIR, "--scale", "1-11", "--rationales", 1).out)
    assert (len(told["distribution"]), "rationales" in told) == (11, False)
    # In any folder, where R4R_CONFIG says so; a kept run goes on as it began.
    monkeypatch.setenv("R4R_CONFIG", str(file))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    begun = ("--rationales", 1, "--scale", "1-7")
    assert r4r("rate", *PAIR, "--ask", "--thread", "monday", *begun).code == 3
    monkeypatch.setenv("R4R_SCALE", "1-3")
    told = json.loads(r4r("resume", "monday", "--answer", "accept", "--json").out)
    assert len(told["distribution"]) == 7


def test_settings_without_an_option_reach_the_run(
    r4r: R4r, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    reviews_file(write)
    write('engine = "fake"\nreviews = "reviews.jsonl"\nround_size = 1\nsure = 0.01\nscale="1-9"')
    told = json.loads(r4r("rate", *PAIR, "--rationales", 3).out)
    assert told["model"]["base"] == "fake"
    assert told["usage"]["reasoner"]["calls"] == 1  # sure after the first round of one
    monkeypatch.setenv("R4R_SURE", "1.0")
    told = json.loads(r4r("rate", *PAIR, "--rationales", 3).out)
    assert told["usage"]["reasoner"]["calls"] == 3


def test_the_model_is_asked_for_as_looked_up(
    r4r: R4r, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    reviews_file(write)
    asked: list[dict[str, Any]] = []

    def load(*_: Any, **settings: Any) -> Any:
        asked.append(settings)
        raise DataError("seen")

    monkeypatch.setattr(Recommender, "load", load)
    write('reviews = "reviews.jsonl"\ndtype = "bfloat16"\nquantize_4bit = true\n')
    for command in (("rate", *PAIR), ("summarize",), ("demo",)):
        assert r4r(*command).complaint == "seen"
    assert [(one["dtype"], one["quantize_4bit"]) for one in asked] == [("bfloat16", True)] * 3
    r4r("summarize", "--dtype", "float16")
    assert asked[-1]["dtype"] == "float16"


def test_a_bad_file_ends_a_command_but_not_its_help(r4r: R4r, write: Write) -> None:
    write("reveiws = 'x'")
    done = r4r("rate", *PAIR)
    assert done.code == 2
    assert "r4r.toml: unknown key reveiws" in done.complaint
    assert r4r("rate", "--help").code == 0
    assert r4r("--version").code == 0


def test_a_server_that_a_file_names_is_told_of(
    r4r: R4r, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reviews would go there, and the key."""
    reviews_file(write)

    def load(*_: Any, **settings: Any) -> Any:
        raise DataError(f"asked {settings['engine']}")

    monkeypatch.setattr(Recommender, "load", load)
    write('reviews = "reviews.jsonl"\nengine = "http://127.0.0.1:9"')
    done = r4r("rate", *PAIR)
    assert done.complaint == "asked http://127.0.0.1:9"
    assert "the engine is http://127.0.0.1:9" in " ".join(done.err.split())
