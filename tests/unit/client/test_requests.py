"""Responses must match the declared types. Other responses are rejected."""

import asyncio
import inspect
import json

import pytest

from doubles.sample_task import task_status
from sandbox.client import InvalidParameterError, UnexpectedResponseError, requests
from sandbox.client.connection_settings import resolve_connection
from sandbox.client.parsing import matches_schema
from sandbox.client.response_types import Health, Task
from sandbox.client.terminal import OPEN_TIMEOUT_SECONDS, Terminal, TerminalEnd, open_terminal
from sandbox.model.fixed_limits import (
    BODY_BYTES_MAX,
    DEBUG_SESSION_END_TIMEOUT_SECONDS,
    DEBUG_SESSION_START_TIMEOUT_SECONDS,
    SANDBOX_TEARDOWN_SECONDS,
)
from sandbox.model.manifest.field_formats import PROMPT_BYTES_MAX

ARGUMENTS = {
    **dict.fromkeys(("content_type", "labels", "reason", "older_than_seconds", "keep", "max_bytes", "prompt")),
    **{
        "manifest": "",
        "idempotency_key": "k",
        "states": (),
        "overrides": (),
        "action": "rerun",
        "fields": {},
        "task_id": "t",
        "host": "h",
        "seconds": 1,
        "force": False,
        "dry_run": True,
    },
}
"""A value for each parameter of the functions in `requests`."""


def json_requests():
    """Yield each request that has a JSON response."""
    for function in vars(requests).values():
        if str(getattr(function, "__annotations__", {}).get("return", "")).startswith("Request["):
            parameters = inspect.signature(function).parameters.values()
            names = [each.name for each in parameters if each.kind is not each.VAR_KEYWORD and each.name in ARGUMENTS]
            if "StreamedBody" not in function.__annotations__["return"]:
                yield function(**{name: ARGUMENTS[name] for name in names})


REQUESTS = list(json_requests())


def parse(request, body):
    return resolve_connection(None, None, 1).parse_response(request, 200, json.dumps(body).encode())


def test_client_timeouts_exceed_server_timeouts():
    """A shorter client timeout would expire before the server's message arrives."""
    assert requests.release("t").read_timeout_seconds > SANDBOX_TEARDOWN_SECONDS + DEBUG_SESSION_END_TIMEOUT_SECONDS
    assert OPEN_TIMEOUT_SECONDS > DEBUG_SESSION_START_TIMEOUT_SECONDS


def test_manifest_is_sent_without_unicode_escapes():
    """Escapes would triple the size of non-ASCII text."""
    prompt = "Я" * (PROMPT_BYTES_MAX // 2)
    sent = requests.submit({"claude": {"prompt": prompt}}, None, "k").content
    assert len(sent) < BODY_BYTES_MAX
    assert json.loads(sent) == {"claude": {"prompt": prompt}}
    with_lone_surrogate = requests.submit({"claude": {"prompt": "\ud800"}}, None, "k").content
    assert json.loads(with_lone_surrogate) == {"claude": {"prompt": "\ud800"}}


@pytest.mark.parametrize("body", [{}, {"hello": "world"}, {"tasks": 1, "artifacts": [1], "status": None}])
@pytest.mark.parametrize("api_request", REQUESTS, ids=lambda request: f"{request.method} {request.path}")
def test_response_of_another_program_is_rejected(api_request, body):
    with pytest.raises(UnexpectedResponseError, match="unexpected response"):
        parse(api_request, body)


def test_reading_a_missing_key_raises_unexpected_response_error():
    task = parse(requests.status("t"), {"id": "t", "state": "running", "progress": {}, "more": [{}]})
    assert (task["state"], task.get("name"), json.dumps(task["progress"])) == ("running", None, "{}")
    for read in (lambda: task["name"], lambda: task["progress"]["turns"], lambda: task["more"][0]["x"]):
        with pytest.raises(UnexpectedResponseError, match="lacks"):
            read()


def test_additional_fields_are_accepted():
    for changes in ({"state": "paused"}, {"vm_ip": "10.0.0.1"}, {"more": {"a": [1]}}, {"result": {"a": 1e999}}):
        assert matches_schema({**task_status("running"), **changes}, Task)


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
def test_value_of_wrong_type_is_rejected(changes):
    assert not matches_schema({**task_status("running"), **changes}, Task)


def test_infinite_number_is_rejected():
    assert matches_schema({"uptime_seconds": 3}, Health)
    assert not matches_schema({"uptime_seconds": float("inf")}, Health)


class Socket:
    """A WebSocket that yields the given messages."""

    def __init__(self, *messages):
        self._messages = iter(messages)

    def __aiter__(self):
        return self

    async def __anext__(self):
        return next(self._messages)


def read_messages(*messages):
    async def read():
        received = Terminal("http://localhost:8122", Socket(*messages)).messages()
        return [await anext(received) for _ in messages]

    return asyncio.run(read())


async def test_terminal_rejects_a_non_ascii_token():
    async def connect():
        async with open_terminal("http://localhost:9", "geheim-ü", "t"):
            pass

    with pytest.raises(InvalidParameterError, match="token"):
        await connect()


@pytest.mark.parametrize(("text", "reason"), [("a\udcff", "UTF-8"), ("a" * 70_000, "too long")], ids=["bytes", "long"])
def test_terminal_rejects_arguments_that_a_url_cannot_contain(text, reason):
    async def connect(task_id, **options):
        async with open_terminal("http://localhost:9", None, task_id, **options):
            pass

    with pytest.raises(InvalidParameterError, match=reason):
        asyncio.run(connect(text))
    with pytest.raises(InvalidParameterError, match=reason):
        asyncio.run(connect("t", term=text))


def test_terminal_yields_the_exit_message():
    assert read_messages(b"$ ", '{"types": true}', '{"type": "exit", "exit_code": 3, "message": "Bye."}') == [
        b"$ ",
        True,
        TerminalEnd(3, "Bye."),
    ]
    assert read_messages('{"type": "exit", "exit_code": [3]}') == [TerminalEnd(None, "")]


@pytest.mark.parametrize("message", ["[]", "nonsense", "5", "[" * 100_000])
def test_terminal_rejects_unknown_messages(message):
    with pytest.raises(UnexpectedResponseError):
        read_messages(message)
