"""An answer has the keys and the kinds that are promised, or is told for none of Sandbox's."""

import asyncio
import json

import pytest

from doubles.recorded_task import status
from sandbox.client import InvalidParameterError, UnexpectedAnswerError, requests
from sandbox.client.connection import resolve_connection
from sandbox.client.response_dict import matches_schema
from sandbox.client.responses import Health, Task
from sandbox.client.terminal import OPEN_TIMEOUT_SECONDS, Exit, Terminal, open_terminal
from sandbox.model.limits import (
    BODY_BYTES_MAX,
    DEBUG_SESSION_END_SECONDS,
    DEBUG_SESSION_START_SECONDS,
    SANDBOX_TEARDOWN_SECONDS,
)
from sandbox.model.manifest.formats import PROMPT_BYTES_MAX

CALLS = [
    requests.submit("", None, "k"),
    requests.check("", None),
    requests.tasks((), None),
    requests.status("t"),
    requests.wait("t", 1),
    requests.cancel("t", None, force=False),
    requests.release("t"),
    requests.artifacts("t"),
    requests.health(),
    requests.prune(older_than_seconds=None, keep=None, max_bytes=None, dry_run=True),
    requests.drain(),
    requests.undo_drain(),
    requests.draining(),
]


def answer(call, told):
    return resolve_connection(None, None, 1).parse_response(call, 200, json.dumps(told).encode())


def test_who_waits_for_the_server_waits_longer_than_the_server_may_take():
    """Else its sentence about what took so long never arrives."""
    assert requests.release("t").read_seconds > SANDBOX_TEARDOWN_SECONDS + DEBUG_SESSION_END_SECONDS
    assert OPEN_TIMEOUT_SECONDS > DEBUG_SESSION_START_SECONDS


def test_a_manifest_is_sent_as_long_as_it_is():
    """Letters that are no ASCII make a text thrice as long where they are sent as escapes."""
    prompt = "Я" * (PROMPT_BYTES_MAX // 2)
    sent = requests.submit({"claude": {"prompt": prompt}}, None, "k").content
    assert len(sent) < BODY_BYTES_MAX
    assert json.loads(sent) == {"claude": {"prompt": prompt}}
    halved = requests.submit({"claude": {"prompt": "\ud800"}}, None, "k").content
    assert json.loads(halved) == {"claude": {"prompt": "\ud800"}}


@pytest.mark.parametrize("told", [{}, {"hello": "world"}, {"tasks": 1, "artifacts": [1], "status": None}])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call.method} {call.path}")
def test_an_object_of_another_program_is_no_answer(call, told):
    with pytest.raises(UnexpectedAnswerError, match="unexpected response"):
        answer(call, told)


def test_a_key_that_an_older_server_does_not_tell_is_missed_by_whoever_reads_it():
    told = answer(requests.status("t"), {"id": "t", "state": "running", "progress": {}, "more": [{}]})
    assert (told["state"], told.get("name"), json.dumps(told["progress"])) == ("running", None, "{}")
    for read in (lambda: told["name"], lambda: told["progress"]["turns"], lambda: told["more"][0]["x"]):
        with pytest.raises(UnexpectedAnswerError, match="lacks"):
            read()


def test_what_a_newer_server_tells_is_taken():
    for changes in ({"state": "paused"}, {"vm_ip": "10.0.0.1"}, {"more": {"a": [1]}}, {"result": {"a": 1e999}}):
        assert matches_schema({**status("running"), **changes}, Task)


@pytest.mark.parametrize(
    "changes",
    [
        {"state": 1},
        {"name": None},
        {"created_at": 5},
        {"labels": {"team": 1}},
        {"attempts": [{"error": "bad"}]},
        {"exit_code": "0"},
        {"progress": {"turns": "many"}},
        {"progress": {"cost_usd": float("nan")}},
        {"progress": {"input_tokens": 10**400}},
        {"definition": []},
    ],
)
def test_a_value_of_another_kind_is_no_answer(changes):
    assert not matches_schema({**status("running"), **changes}, Task)


def test_times_without_end_are_no_figures():
    assert matches_schema({"uptime_seconds": 3}, Health)
    assert not matches_schema({"uptime_seconds": float("inf")}, Health)


class Socket:
    """Gives what a server sends."""

    def __init__(self, *messages):
        self._messages = iter(messages)

    def __aiter__(self):
        return self

    async def __anext__(self):
        return next(self._messages)


def shown(*messages):
    async def read():
        frames = Terminal("http://localhost:8122", Socket(*messages)).messages()
        return [await anext(frames) for _ in messages]

    return asyncio.run(read())


def test_a_terminal_is_not_asked_for_with_a_token_that_no_request_can_bring():
    async def ask():
        async with open_terminal("http://localhost:9", "geheim-ü", "t"):
            pass

    with pytest.raises(InvalidParameterError, match="token"):
        asyncio.run(ask())


@pytest.mark.parametrize(("text", "reason"), [("a\udcff", "UTF-8"), ("a" * 70_000, "too long")], ids=["bytes", "long"])
def test_a_terminal_is_not_asked_for_with_what_no_address_can_hold(text, reason):
    async def ask(task_id, **wanted):
        async with open_terminal("http://localhost:9", None, task_id, **wanted):
            pass

    with pytest.raises(InvalidParameterError, match=reason):
        asyncio.run(ask(text))
    with pytest.raises(InvalidParameterError, match=reason):
        asyncio.run(ask("t", term=text))


def test_a_terminal_tells_its_end():
    assert shown(b"$ ", '{"types": true}', '{"type": "exit", "exit_code": 3, "message": "Bye."}') == [
        b"$ ",
        True,
        Exit(3, "Bye."),
    ]
    assert shown('{"type": "exit", "exit_code": [3]}') == [Exit(None, "")]


@pytest.mark.parametrize("message", ["[]", "nonsense", "5", "[" * 100_000])
def test_a_terminal_that_says_what_no_server_says_is_none(message):
    with pytest.raises(UnexpectedAnswerError):
        shown(message)
