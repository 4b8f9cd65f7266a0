"""The scripted model answers as the Messages API would, a turn at a time."""

import asyncio
import json
import os
import signal
import subprocess
import sys

import httpx
import msgspec
import pytest

from sandbox.demo.model_script import Fault, Script, Text, ToolUse, Turn
from sandbox.demo.scripted_model import ScriptedModel

LOOK = Turn((Text("I look."), ToolUse("Read", {"file_path": "a.txt"})), input_tokens=7, output_tokens=3)
DONE = Turn((Text("Done."),))


def request(*, assistant_messages=0, stream=True, first="Do it."):
    conversation = [{"role": "user", "content": first}]
    for _ in range(assistant_messages):
        conversation += [{"role": "assistant", "content": "…"}, {"role": "user", "content": "go on"}]
    return {"model": "claude-x", "max_tokens": 10, "stream": stream, "messages": conversation}


def talk(script, ask):
    async def run():
        async with ScriptedModel(script) as model, httpx.AsyncClient(base_url=model.url, trust_env=False) as client:
            return await ask(client, model)

    return asyncio.run(run())


def events(answer):
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]


def said(answer):
    return [event["delta"].get("text") for event in events(answer) if event["type"] == "content_block_delta"]


def test_the_turn_is_found_by_counting_so_asking_again_gives_it_again():
    async def ask(client, model):
        for assistant_messages in (0, 1, 0, 1, 5):
            yield await client.post("/v1/messages?beta=true", json=request(assistant_messages=assistant_messages))

    async def collect(client, model):
        return [said(answer)[0] async for answer in ask(client, model)]

    script = Script((LOOK, DONE))
    assert talk(script, collect) == ["I look.", "Done.", "I look.", "Done.", "The script is over."]


def test_a_streamed_turn_has_the_apis_events():
    answer = talk(Script((LOOK,)), lambda client, _: client.post("/v1/messages", json=request()))
    told = events(answer)
    assert answer.headers["content-type"] == "text/event-stream"
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert [event["type"] for event in told] == ["message_start", *block, *block, "message_delta", "message_stop"]
    assert told[0]["message"]["model"] == "claude-x"
    assert told[0]["message"]["usage"]["input_tokens"] == 7
    assert json.loads(told[5]["delta"]["partial_json"]) == {"file_path": "a.txt"}
    assert told[-2]["delta"]["stop_reason"] == "tool_use"
    assert told[-2]["usage"]["output_tokens"] == 3


def test_without_a_stream_the_turn_is_one_object():
    answer = talk(Script((LOOK,)), lambda client, _: client.post("/v1/messages", json=request(stream=False))).json()
    assert [block["type"] for block in answer["content"]] == ["text", "tool_use"]
    assert answer["stop_reason"] == "tool_use"
    assert answer["usage"]["output_tokens"] == 3


def test_a_subagent_has_a_branch_of_its_own():
    script = Script((LOOK,), {"BRANCH": (DONE,)})
    answer = talk(script, lambda client, _: client.post("/v1/messages", json=request(first="BRANCH: look")))
    assert said(answer) == ["Done."]


def test_faults_come_first_and_pass():
    turn = Turn(DONE.content, faults=(Fault("error", 529, "Busy", times=2), Fault("cut")))

    async def ask(client, _):
        statuses = [(await client.post("/v1/messages", json=request())) for _ in range(2)]
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post("/v1/messages", json=request())
        return statuses, await client.post("/v1/messages", json=request())

    failed, answer = talk(Script((turn,)), ask)
    assert [(answer.status_code, answer.json()["error"]) for answer in failed] == [
        (529, {"type": "overloaded_error", "message": "Busy"})
    ] * 2
    assert said(answer) == ["Done."]


def test_a_hanging_turn_never_answers_and_ends_with_the_model():
    async def ask(client, _):
        with pytest.raises(httpx.ReadTimeout):
            await client.post("/v1/messages", json=request(), timeout=0.2)

    talk(Script((Turn(faults=(Fault("hang"),)),)), ask)


def test_requests_are_kept_for_assertions():
    async def ask(client, model):
        await client.post("/v1/messages", json=request(), headers={"X-Api-Key": "k"})
        await client.post("/v1/messages/count_tokens", json=request())
        return model

    model = talk(Script((DONE,)), ask)
    assert [kept.path for kept in model.requests] == ["/v1/messages", "/v1/messages/count_tokens"]
    assert model.requests[0].headers["x-api-key"] == "k"
    assert model.messages == [request()]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/messages", b"no json", 400),
        ("POST", "/v1/messages", b"{}", 400),
        ("POST", "/v1/messages", b'{"model": "\xff"}', 400),
        ("POST", "/v1/messages", b'{"messages": [1]}', 400),
        ("GET", "/v1/models", b"", 404),
        ("HEAD", "/", b"", 200),
    ],
)
def test_what_it_does_not_play_gets_an_answer_too(method, path, body, status):
    answer = talk(Script((DONE,)), lambda client, _: client.request(method, path, content=body))
    assert answer.status_code == status


def test_as_a_process_it_says_where_it_is_and_records_what_it_was_asked(tmp_path):
    script, record = tmp_path / "script.json", tmp_path / "requests.ndjson"
    script.write_bytes(msgspec.json.encode(Script((DONE,))))
    command = [sys.executable, "-m", "sandbox.demo.scripted_model", "--script", script, "--record", record]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=dict(os.environ)) as process:
        try:
            url = json.loads(process.stdout.readline())["url"]
            answer = httpx.post(f"{url}/v1/messages", json=request(), trust_env=False)
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    assert said(answer) == ["Done."]
    (recorded,) = [json.loads(line) for line in record.read_text().splitlines()]
    assert json.loads(recorded["body"]) == request()
