"""The teacher, asked over a real socket: every answer paid for once, within the limit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from finetune.teacher import Answer
from r4r_graph import chat_models
from r4r_graph.errors import AnswerError, SettingError, TeacherError
from tests.teacher_server import (
    PROMPT,
    SECRET,
    SUMMARY,
    ChatServer,
    Reply,
    ask,
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


# Asking -----------------------------------------------------------------------------------------


def test_an_answer_and_what_it_cost(server: ChatServer, tmp_path: Path) -> None:
    with teacher_of(server, tmp_path / "answers.sqlite", temperature=0.7) as teacher:
        [answer] = ask(teacher, "One?", max_tokens=50, top_p=0.9, format="aspects")
        assert answer.text == SUMMARY
        assert not answer.reused
        assert answer.prompt_tokens + answer.completion_tokens == server.spent
        spent = teacher.spent
    assert (spent.calls, spent.reused) == (1, 0)
    assert (spent.prompt, spent.completion) == (answer.prompt_tokens, answer.completion_tokens)
    [body] = server.bodies
    assert body["temperature"] == 0.7
    assert body["top_p"] == 0.9
    assert body["max_tokens"] == 50
    assert not {"max_completion_tokens", "format", "seed"} & set(body)
    # Neighbouring turns of one role are one: many providers demand it.
    assert [turn["role"] for turn in body["messages"]] == ["system", "user"]
    assert body["messages"][1]["content"] == "Context.\n\nOne?"
    assert server.keys == {f"Bearer {SECRET}"}


def test_a_paid_answer_is_never_paid_again(server: ChatServer, tmp_path: Path) -> None:
    file = tmp_path / "answers.sqlite"
    with teacher_of(server, file) as teacher:
        first = ask(teacher, "One?", "Two?")
        again = ask(teacher, "One?", "Two?")
        assert teacher.spent.reused == 2
    with teacher_of(server, file) as teacher:
        [later] = ask(teacher, "One?")
        assert teacher.spent.calls == 0
        assert teacher.spent.earlier == teacher.spent.total == server.spent
    assert [a.text for a in again] == [a.text for a in first]
    assert all(answer.reused for answer in (*again, later))
    assert once_each(server.asked)
    assert file.stat().st_mode & 0o077 == 0


def test_what_makes_another_question(server: ChatServer, tmp_path: Path) -> None:
    file = tmp_path / "answers.sqlite"
    with teacher_of(server, file) as teacher:
        for settings in ({}, {"draw": 1}, {"temperature": 0.5}, {"max_tokens": 9}, {"top_p": 0.5}):
            [answer] = ask(teacher, "One?", **settings)
            assert not answer.reused
    with teacher_of(server, file, model="other") as teacher:
        assert not ask(teacher, "One?")[0].reused
    assert len(server.bodies) == 6


def test_the_same_question_at_once_is_asked_once(server: ChatServer, tmp_path: Path) -> None:
    def slowly(_: dict[str, Any]) -> Reply:
        time.sleep(0.05)
        return 200, SUMMARY

    server.reply = slowly
    with teacher_of(server, tmp_path / "answers.sqlite") as teacher:
        answers = ask(teacher, *["One?"] * 5)
    assert sorted(answer.reused for answer in answers) == [False, True, True, True, True]
    assert len(server.bodies) == 1


def test_calls_run_side_by_side_up_to_the_concurrency(server: ChatServer, tmp_path: Path) -> None:
    def slowly(_: dict[str, Any]) -> Reply:
        time.sleep(0.05)
        return 200, SUMMARY

    server.reply = slowly
    with teacher_of(server, tmp_path / "answers.sqlite", concurrency=3) as teacher:
        ask(teacher, *map(str, range(12)))
    assert server.most_at_once == 3


def test_what_may_pass_is_tried_again(server: ChatServer, tmp_path: Path) -> None:
    replies = iter([(429, "slow down"), (500, "sorry"), (503, "busy"), (200, SUMMARY)])
    server.reply = lambda _: next(replies)
    with teacher_of(server, tmp_path / "answers.sqlite", attempts=4) as teacher:
        [answer] = ask(teacher, "One?")
        assert answer.text == SUMMARY
        assert teacher.spent.calls == 1
    assert len(server.bodies) == 4


def test_the_pauses_grow_and_obey_the_server(
    server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    real = chat_models.pause
    monkeypatch.setattr(
        "r4r_graph.chat_models.pause",
        lambda state: pauses.append(real(state)) or min(pauses[-1], 0.01),
    )
    server.reply = lambda _: (500, "sorry")
    with teacher_of(server, tmp_path / "a.sqlite", attempts=6) as teacher:
        assert isinstance(ask(teacher, "One?")[0], AnswerError)
    assert len(server.bodies) == 6
    for number, pause in enumerate(pauses):
        assert 0.01 * 2**number <= pause <= 0.01 * 2**number + 0.01
    pauses.clear()
    replies = iter([(429, "slow down"), (200, SUMMARY)])
    server.reply, server.headers = (lambda _: next(replies)), {"Retry-After": "7"}
    with teacher_of(server, tmp_path / "a.sqlite") as teacher:
        ask(teacher, "Two?")
    assert pauses == [7.0]


def test_a_row_that_keeps_failing_costs_no_other(server: ChatServer, tmp_path: Path) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        return (500, "sorry") if "bad" in body["messages"][-1]["content"] else (200, SUMMARY)

    server.reply = reply
    with teacher_of(server, tmp_path / "answers.sqlite", attempts=3) as teacher:
        good, bad, fine = ask(teacher, "good", "bad", "fine")
    assert good.text == fine.text == SUMMARY
    assert isinstance(bad, AnswerError)
    assert "500" in str(bad)
    assert sum(n for q, n in server.asked.items() if "bad" in q) == 3


def test_a_request_that_is_refused_is_not_repeated(server: ChatServer, tmp_path: Path) -> None:
    server.reply = lambda _: (400, "too long")
    with teacher_of(server, tmp_path / "answers.sqlite") as teacher:
        [error] = ask(teacher, "One?")
    assert isinstance(error, AnswerError)
    assert "too long" in str(error)
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("reply", "tries", "message"),
    [
        ((401, "bad key"), 1, r"refused the key \(HTTP 401\); set the provider's key"),
        ((403, "not you"), 1, "refused the key"),
        ((404, "no such model"), 1, "cannot be used: .*no such model"),
        ((429, "insufficient_quota"), 1, "cannot be used: .*insufficient_quota"),
        ((429, "slow down"), 2, r"over its rate limit after 2 tries.*lower teacher\.concurrency"),
    ],
)
def test_what_is_no_rows_fault_ends_the_job(
    server: ChatServer, tmp_path: Path, reply: Reply, tries: int, message: str
) -> None:
    server.reply = lambda _: reply
    with teacher_of(server, tmp_path / "answers.sqlite", attempts=2) as teacher:
        [error] = ask(teacher, "One?")
    assert isinstance(error, TeacherError)
    assert not isinstance(error, AnswerError)
    assert len(server.bodies) == tries
    with pytest.raises(TeacherError, match=message):
        raise error


def test_a_server_that_is_gone_ends_the_job(server: ChatServer, tmp_path: Path) -> None:
    gone = ChatServer()
    gone.close()
    with teacher_of(gone, tmp_path / "answers.sqlite", attempts=2) as teacher:
        [error] = ask(teacher, "One?")
    assert isinstance(error, TeacherError)
    assert not isinstance(error, AnswerError)
    assert "cannot be reached" in str(error)


def test_when_every_row_fails_it_is_not_the_rows(server: ChatServer, tmp_path: Path) -> None:
    server.reply = lambda _: (500, "sorry")
    with teacher_of(server, tmp_path / "a.sqlite", attempts=1, concurrency=1) as teacher:
        errors = [ask(teacher, str(n))[0] for n in range(25)]
        assert all(isinstance(error, AnswerError) for error in errors[:-1])
        assert not isinstance(errors[-1], AnswerError)
        assert "failed on 25 rows one after the other" in str(errors[-1])
        server.reply = lambda _: (200, SUMMARY)
        assert isinstance(ask(teacher, "more")[0], Answer)
        server.reply = lambda _: (500, "sorry")
        assert isinstance(ask(teacher, "and more")[0], AnswerError)


def test_a_server_that_does_not_count_is_taken_to_charge_the_most(
    server: ChatServer, tmp_path: Path
) -> None:
    server.usage = False
    with teacher_of(server, tmp_path / "answers.sqlite") as teacher:
        [answer] = ask(teacher, "One?")
    assert answer.prompt_tokens >= sum(len(m.content) for m in PROMPT[:2]) + len("One?")
    assert answer.completion_tokens == len(SUMMARY)


def test_a_line_that_breaks_is_a_failure_never_an_answer(
    server: ChatServer, tmp_path: Path
) -> None:
    real, broken = server._serve, []

    def serve(handler: BaseHTTPRequestHandler) -> None:
        if len(broken) < 2:
            broken.append(handler)
            if len(broken) == 1:  # no answer at all, then one that is no chat completion
                handler.close_connection = True
                return
            handler.rfile.read(int(handler.headers["Content-Length"]))
            handler.send_response(200)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", "9")
            handler.end_headers()
            handler.wfile.write(b"{garbage}")
            return
        real(handler)

    server._serve = serve  # type: ignore[method-assign]
    with teacher_of(server, tmp_path / "answers.sqlite", attempts=3) as teacher:
        [answer] = ask(teacher, "One?")
        assert answer.text == SUMMARY
        assert teacher.spent.calls == 1


def test_secrets_are_written_nowhere(
    server: ChatServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="finetune")
    server.reply = lambda _: (400, f"bad key {SECRET} at https://me:hunter2@example.org/x?k=y")
    url = server.url.replace("http://", "http://me:hunter2@")
    with teacher_of(server, tmp_path / "answers.sqlite", base_url=url) as teacher:
        [error] = ask(teacher, "One?")
        assert teacher.identity == {"model": "small-model", "base_url": server.url}
        server.reply = lambda _: (200, SUMMARY)
        assert isinstance(ask(teacher, "Two?")[0], Answer)
        stored = b"".join(p.read_bytes() for p in tmp_path.iterdir())
    assert "bad key" in str(error)
    for secret in (SECRET, "hunter2"):
        assert secret not in str(error)
        assert secret not in caplog.text
        assert secret.encode() not in stored
    assert b"Two?" not in stored  # questions hold reviews


def test_a_file_that_is_no_answers_file(server: ChatServer, tmp_path: Path) -> None:
    file = tmp_path / "answers.sqlite"
    file.write_bytes(b"no database at all, but long enough to be read as one" * 20)
    with pytest.raises(
        SettingError, match=r"cannot use .*answers\.sqlite, the file of the teacher"
    ):
        teacher_of(server, file)


def test_unknown_settings_and_a_closed_teacher(server: ChatServer, tmp_path: Path) -> None:
    teacher = teacher_of(server, tmp_path / "a.sqlite")
    [error] = ask(teacher, "One?", temprature=1)
    assert isinstance(error, SettingError)
    assert "temprature" in str(error)
    teacher.close()
    [error] = ask(teacher, "One?")
    assert isinstance(error, TeacherError)
    assert not server.bodies


# The limit --------------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, 8])
def test_the_token_limit_is_never_passed(
    server: ChatServer, tmp_path: Path, concurrency: int
) -> None:
    file, limit = tmp_path / "answers.sqlite", 1500
    questions = [f"Question {n}?" for n in range(60)]
    settings = {"concurrency": concurrency, "token_limit": limit}
    with teacher_of(server, file, **settings) as teacher:
        results = ask(teacher, *questions, max_tokens=100)
        stopped = [r for r in results if isinstance(r, TeacherError)]
        assert not any(isinstance(r, AnswerError) for r in results)
        assert teacher.spent.total == server.spent <= limit
    assert 10 < len(server.bodies) < 60
    # What does not fit beside others waits for their real cost: the limit is used up to a call.
    assert server.spent > limit - 100 - sum(len(m.content) for m in PROMPT) - 128 - 30
    message = (
        r"token limit is reached: \d+ tokens are spent.*teacher\.token_limit is 1500; raise it"
    )
    with pytest.raises(TeacherError, match=message):
        raise stopped[0]
    # What earlier runs spent counts.
    with teacher_of(server, file, **settings) as teacher:
        assert teacher.spent.earlier == server.spent
        assert isinstance(ask(teacher, "one more", max_tokens=400)[0], TeacherError)
    with teacher_of(server, file, token_limit=100_000) as teacher:
        answers = ask(teacher, *questions, max_tokens=100)
        assert all(isinstance(answer, Answer) for answer in answers)
        assert teacher.spent.total == server.spent
    assert once_each(server.answered)
