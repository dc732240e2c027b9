"""What may be the teacher: our own base model, any chat model; what cannot be opened, and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage

from finetune.settings import TeacherSettings, parse_recipe
from finetune.teacher import Answer, Teacher, label_aspects, open_teacher
from r4r_graph.engine.base import GenerateRequest
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.errors import MissingExtraError, SettingError, TeacherError
from r4r_graph.evidence import TokenBudgets
from tests.teacher_server import (
    REVIEWS,
    SECRET,
    SUMMARY,
    ChatServer,
    ask,
    made_recipe,
    once_each,
    set_environment,
    teacher_of,
)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch)


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with closing(ChatServer()) as made:
        yield made


# Our own base model -----------------------------------------------------------------------------


def test_an_engine_as_teacher(tmp_path: Path, fake: Callable[..., BatchingEngine]) -> None:
    asked: list[GenerateRequest] = []

    def write(request: GenerateRequest) -> str:
        asked.append(request)
        return SUMMARY if request.seed % 2 else "positive: ...\nnegative: ...\nvalues: ..."

    recipe = made_recipe(tmp_path, {"attempts": 20})
    engine = fake(write=write)
    report = label_aspects(recipe, engine)
    assert report.failed == 0
    assert report.spent.calls == len(asked) > report.rows
    assert {request.format for request in asked} == {"aspects"}
    assert {request.max_tokens for request in asked} == {TokenBudgets().summary}
    assert {request.temperature for request in asked} == {1.0}
    assert {request.adapter for request in asked} == {None}
    drawn = Counter((request.messages, request.seed) for request in asked)
    assert once_each(drawn)  # another draw has another seed
    assert [turn.role for turn in asked[0].messages] == ["system", "user", "user"]
    assert engine.info.base == "fake"  # not closed: it is the caller's
    again = made_recipe(tmp_path, {"attempts": 20})
    assert label_aspects(again, engine).reused == report.rows


def test_an_engines_failure_is_a_rows_failure(
    tmp_path: Path, fake: Callable[..., BatchingEngine]
) -> None:
    def write(request: GenerateRequest) -> str:
        if "Words 3 " in request.messages[1].content:
            raise LookupError("no words for it")
        return SUMMARY

    report = label_aspects(made_recipe(tmp_path, {}), fake(write=write))
    assert 0 < report.failed < report.rows
    assert all("no words for it" in reason for reason in report.reasons)


def test_a_greedy_teacher_is_not_asked_to_repeat_itself(
    tmp_path: Path, fake: Callable[..., BatchingEngine]
) -> None:
    asked: list[GenerateRequest] = []
    engine = fake(write=lambda request: asked.append(request) or "no")
    report = label_aspects(made_recipe(tmp_path, {"temperature": 0.0}), engine)
    assert len(asked) == report.rows == report.failed


def test_the_recipes_base_model_is_loaded_and_closed(tmp_path: Path, tiny_base: Path) -> None:
    recipe = made_recipe(tmp_path, {"rows": 2})
    recipe = parse_recipe(
        {
            "reviews": str(recipe.reviews),
            "work": str(recipe.work),
            "base": str(tiny_base),
            "device": "cpu",
            "history": 3,
            "splits": {"reward_rows": 2, "instruction_rows": 6},
            "teacher": {"rows": 2},
        }
    )
    report = label_aspects(recipe)
    assert report.rows == 2
    assert report.spent.calls >= 2
    manifest = json.loads((report.path / "_job.json").read_text())
    assert manifest["teacher"]["base"] == "tiny"
    assert label_aspects(recipe).reused == 2


def test_a_server_is_asked_with_the_base_models_token_budgets(
    tmp_path: Path, tiny_base: Path, server: ChatServer
) -> None:
    """Without an engine, the tokenizer of the model to be trained cuts the reviews."""
    made_recipe(tmp_path, {})
    recipe = parse_recipe(
        {
            "reviews": str(tmp_path / "reviews.jsonl"),
            "work": str(tmp_path / "work"),
            "base": str(tiny_base),
            "history": 3,
            "budgets": {"review": 8},
            "splits": {"reward_rows": 2, "instruction_rows": 6},
            "teacher": {"model": "openai:m", "base_url": server.url, "rows": 2},
        }
    )
    assert label_aspects(recipe).failed == 0
    for body in server.bodies:
        text = body["messages"][1]["content"]
        assert "Words" in text or "Word" in text
        assert not any(review.text in text for review in REVIEWS)  # cut


# Any chat model ---------------------------------------------------------------------------------


def test_any_chat_model_of_langchain(tmp_path: Path) -> None:
    model = GenericFakeChatModel(messages=iter([AIMessage(SUMMARY), AIMessage("other")]))
    with Teacher(model, TeacherSettings(model="mine"), tmp_path / "a.sqlite") as teacher:
        one, again, two = (ask(teacher, text)[0] for text in ("One?", "One?", "Two?"))
    assert (one.text, again.text, two.text) == (SUMMARY, SUMMARY, "other")
    assert again.reused


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"model": "gpt-4o-mini"}, SettingError, "write provider:model, such as openai:gpt"),
        ({"model": "engine", "base_url": "http://x"}, SettingError, "needs the name of a model"),
        ({"model": "openai:m", "concurrency": 0}, SettingError, "concurrency=0"),
        ({"model": "openai:m", "attempts": 0}, SettingError, "attempts=0"),
        ({"model": "nobody:m"}, TeacherError, "cannot open the teacher nobody:m: .*nobody"),
        ({"model": "anthropic:m"}, TeacherError, "langchain-anthropic"),
    ],
)
def test_bad_teachers(
    tmp_path: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    recipe = parse_recipe({"reviews": "r", "teacher": settings})
    with pytest.raises(error, match=message):
        open_teacher(recipe, tmp_path / "a.sqlite")


def test_a_missing_key_and_a_missing_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: ChatServer
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    recipe = parse_recipe({"reviews": "r", "teacher": {"model": "openai:m"}})
    with pytest.raises(TeacherError, match=r"cannot open the teacher openai:m: .*OPENAI_API_KEY"):
        open_teacher(recipe, tmp_path / "a.sqlite")
    with teacher_of(server, tmp_path / "a.sqlite") as teacher:  # a server of one's own needs none
        assert isinstance(ask(teacher, "One?")[0], Answer)
    assert SECRET not in str(server.keys)
    monkeypatch.setitem(__import__("sys").modules, "langchain.chat_models", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'r4r-graph\[teacher\]'"):
        open_teacher(recipe, tmp_path / "a.sqlite")
