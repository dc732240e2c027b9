"""Loads and renders `prompts/*.jinja`: the one renderer for inference and training.

A template has YAML front matter (name, version, paper, inputs) and three Jinja blocks: `system`,
`context` and `task`, each a turn of the prompt. Context comes first and task last, so that prompts
about one user share a beginning. Values are data: `clean` makes each of them one line that can
neither close a tag nor spell a control token, and no template is ever rendered twice.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import yaml

BLOCKS = ("system", "context", "task")
EXPERT_PROMPTS = ("summarizer", "reasoner", "predictor")

_BRACKETS = str.maketrans({"<": "‹", ">": "›", "＜": "‹", "＞": "›", "﹤": "‹", "﹥": "›"})
_PLAIN = re.compile(r"[ -;=?-~]*")  # printable ASCII without angle brackets
_UNUSUAL = re.compile(r"[^ -~]")
_JOINERS = {"\u200c", "\u200d"}  # emoji and Indic scripts need them


@dataclass(frozen=True, slots=True)
class PromptInfo:
    """A template's front matter and digest."""

    name: str
    version: int
    paper: str
    inputs: tuple[str, ...]
    digest: str
    """12 hex digits over the bodies of the template and of what it imports."""


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """The three turns of a prompt, as text."""

    system: str
    context: str
    task: str


def prompt_info(name: str) -> PromptInfo:
    """What is known of a template.

    Raises:
        KeyError: no such template.
    """
    return _load(name)[0]


def prompt_digests() -> dict[str, str]:
    """Expert name to the digest of its prompt."""
    return {name: prompt_info(name).digest for name in EXPERT_PROMPTS}


def render(
    name: str, inputs: Mapping[str, Any], special_tokens: Sequence[str] = ()
) -> RenderedPrompt:
    """Render a template; every text in `inputs` is cleaned first.

    Raises:
        jinja2.UndefinedError: an input is missing.
    """
    _, template = _load(name)
    context = template.new_context(_cleaned(inputs, tuple(special_tokens)))
    turns = {block: "".join(template.blocks[block](context)).strip() for block in BLOCKS}
    return RenderedPrompt(**turns)


def history_line(
    aspects: Mapping[str, Any], *, named: bool, special_tokens: Sequence[str] = ()
) -> str:
    """One review as it stands in the context of reasoner and predictor."""
    module: Any = _environment().get_template("_history.jinja").module
    line = str(module.line(_cleaned(aspects, tuple(special_tokens)), named))
    return line.strip().strip(";")


def clean(text: str, special_tokens: Sequence[str] = ()) -> str:
    """`text` as one line of data.

    White space runs and line breaks of every kind become one space; control characters,
    surrogates and direction overrides go; angle brackets become ‹ and ›, so no tag can be opened
    or closed; strings of the tokenizer's control tokens are broken up by a space, also where only
    Unicode compatibility folding (as some tokenizers do) would spell them. Idempotent.
    """
    control = [t.strip() for t in special_tokens if t.strip() and not set(t) & {"<", ">"}]
    line = " ".join(text.split())
    plain = _PLAIN.fullmatch(line)
    if not plain:
        visible = _UNUSUAL.sub(lambda match: _visible(match[0]), text)
        line = " ".join(visible.translate(_BRACKETS).split())
    found = True
    while found:  # each pass leaves fewer or shorter runs without a space, so this ends
        found = False
        folded = line if plain else unicodedata.normalize("NFKC", line)
        if "<" in folded or ">" in folded or any(t in folded and t not in line for t in control):
            line = " ".join(folded.translate(_BRACKETS).split())
        for token in control:
            if token in line:
                broken = f"{token[0]} {token[1:]}" if len(token) > 1 else " "
                broken = token.replace(" ", "_") if " " in token else broken
                line = " ".join(line.replace(token, broken).split())
                found = True
    return line


def _visible(char: str) -> str:
    """The character, or nothing where it is no part of a visible text."""
    if char.isspace() or char in _JOINERS:
        return char
    return "" if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Cn") else char


def _cleaned(value: Any, special_tokens: tuple[str, ...]) -> Any:
    if isinstance(value, str):
        return clean(value, special_tokens)
    if isinstance(value, Mapping):
        return {key: _cleaned(inner, special_tokens) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(inner, special_tokens) for inner in value]
    return value


def prompts_dir() -> Path:
    """Where the templates are: inside an installed package, else beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "_prompts"
    return inside if inside.is_dir() else package.parent / "prompts"


class _BodyLoader(jinja2.BaseLoader):
    """Gives Jinja a template's body, without its front matter."""

    def get_source(
        self, environment: jinja2.Environment, template: str
    ) -> tuple[str, str | None, None]:
        """See `jinja2.BaseLoader`."""
        path = prompts_dir() / template
        if not path.is_file():
            raise jinja2.TemplateNotFound(template)
        return _split(path)[1], str(path), None


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=_BodyLoader(),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@functools.cache
def _load(name: str) -> tuple[PromptInfo, jinja2.Template]:
    filename = f"{name}.jinja"
    if not (prompts_dir() / filename).is_file():
        raise KeyError(f"no prompt named {name!r}")
    front, _ = _split(prompts_dir() / filename)
    meta = yaml.safe_load(front)
    bodies = "\0".join(_with_imports(filename))
    info = PromptInfo(
        name=meta["name"],
        version=meta["version"],
        paper=meta["paper"],
        inputs=tuple(meta["inputs"]),
        digest=hashlib.sha256(bodies.encode()).hexdigest()[:12],
    )
    return info, _environment().get_template(filename)


def _split(path: Path) -> tuple[str, str]:
    """Front matter (may be empty) and body of a template file."""
    text = path.read_text(encoding="utf-8")
    if not text.startswith("---\n"):
        return "", text
    _, front, body = text.split("---\n", 2)
    return front, body


def _with_imports(filename: str) -> list[str]:
    _, body = _split(prompts_dir() / filename)
    imported = jinja2.meta.find_referenced_templates(_environment().parse(body))
    return [body, *(inner for name in imported if name for inner in _with_imports(name))]
