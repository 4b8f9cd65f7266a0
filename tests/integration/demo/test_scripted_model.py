"""The scripted model implements the Messages API, one turn per request."""

import asyncio
import json
import os
import signal
import subprocess
import sys

import httpx2
import msgspec
import pytest

from sandbox.demo.scripted_model import END_OF_SCRIPT, Fault, Script, ScriptedModel, Text, ToolUse, Turn

READ_TURN = Turn((Text("I look."), ToolUse("Read", {"file_path": "a.txt"})), input_tokens=7, output_tokens=3)
DONE = Turn((Text("Done."),))


def message_request(*, assistant_messages=0, stream=True, first="Do it."):
    conversation = [{"role": "user", "content": first}]
    for _ in range(assistant_messages):
        conversation += [{"role": "assistant", "content": "…"}, {"role": "user", "content": "go on"}]
    return {"model": "claude-x", "max_tokens": 10, "stream": stream, "messages": conversation}


def exchange(script, send):
    async def run():
        async with ScriptedModel(script) as model, httpx2.AsyncClient(base_url=model.url, trust_env=False) as client:
            return await send(client, model)

    return asyncio.run(run())


def events(response):
    return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]


def texts(response):
    return [event["delta"].get("text") for event in events(response) if event["type"] == "content_block_delta"]


def test_repeated_request_returns_the_same_turn():
    async def send(client, model):
        for assistant_messages in (0, 1, 0, 1, 5):
            yield await client.post(
                "/v1/messages?beta=true", json=message_request(assistant_messages=assistant_messages)
            )

    async def collect(client, model):
        return [texts(response)[0] async for response in send(client, model)]

    script = Script((READ_TURN, DONE))
    assert exchange(script, collect) == ["I look.", "Done.", "I look.", "Done.", END_OF_SCRIPT.content[0].text]


def test_streamed_turn_has_the_events_of_the_api():
    response = exchange(Script((READ_TURN,)), lambda client, _: client.post("/v1/messages", json=message_request()))
    streamed = events(response)
    assert response.headers["content-type"] == "text/event-stream"
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert [event["type"] for event in streamed] == ["message_start", *block, *block, "message_delta", "message_stop"]
    assert streamed[0]["message"]["model"] == "claude-x"
    assert streamed[0]["message"]["usage"]["input_tokens"] == 7
    assert json.loads(streamed[5]["delta"]["partial_json"]) == {"file_path": "a.txt"}
    assert streamed[-2]["delta"]["stop_reason"] == "tool_use"
    assert streamed[-2]["usage"]["output_tokens"] == 3


def test_unstreamed_turn_is_one_object():
    response = exchange(
        Script((READ_TURN,)), lambda client, _: client.post("/v1/messages", json=message_request(stream=False))
    ).json()
    assert [block["type"] for block in response["content"]] == ["text", "tool_use"]
    assert response["stop_reason"] == "tool_use"
    assert response["usage"]["output_tokens"] == 3


def test_subagent_uses_a_separate_branch_of_the_script():
    script = Script((READ_TURN,), {"BRANCH": (DONE,)})
    response = exchange(
        script, lambda client, _: client.post("/v1/messages", json=message_request(first="BRANCH: look"))
    )
    assert texts(response) == ["Done."]


def test_faults_of_a_turn_occur_before_its_response():
    turn = Turn(DONE.content, faults=(Fault("error", 529, "Busy", times=2), Fault("cut")))

    async def send(client, _):
        statuses = [(await client.post("/v1/messages", json=message_request())) for _ in range(2)]
        with pytest.raises(httpx2.RemoteProtocolError):
            await client.post("/v1/messages", json=message_request())
        return statuses, await client.post("/v1/messages", json=message_request())

    failed, response = exchange(Script((turn,)), send)
    assert [(response.status_code, response.json()["error"]) for response in failed] == [
        (529, {"type": "overloaded_error", "message": "Busy"})
    ] * 2
    assert texts(response) == ["Done."]


def test_hanging_turn_never_responds_and_ends_when_the_model_stops():
    async def send(client, _):
        with pytest.raises(httpx2.ReadTimeout):
            await client.post("/v1/messages", json=message_request(), timeout=0.2)

    exchange(Script((Turn(faults=(Fault("hang"),)),)), send)


def test_requests_are_recorded_for_assertions():
    async def send(client, model):
        await client.post("/v1/messages", json=message_request(), headers={"X-Api-Key": "k"})
        await client.post("/v1/messages/count_tokens", json=message_request())
        return model

    model = exchange(Script((DONE,)), send)
    assert [recorded.path for recorded in model.requests] == ["/v1/messages", "/v1/messages/count_tokens"]
    assert model.requests[0].headers["x-api-key"] == "k"
    assert model.messages == [message_request()]


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
def test_unsupported_requests_get_a_response(method, path, body, status):
    response = exchange(Script((DONE,)), lambda client, _: client.request(method, path, content=body))
    assert response.status_code == status


def test_process_prints_its_url_and_records_requests(tmp_path):
    script, record = tmp_path / "script.json", tmp_path / "requests.ndjson"
    script.write_bytes(msgspec.json.encode(Script((DONE,))))
    command = [sys.executable, "-m", "sandbox.demo.scripted_model", "--script", script, "--record", record]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=dict(os.environ)) as process:
        try:
            url = json.loads(process.stdout.readline())["url"]
            response = httpx2.post(f"{url}/v1/messages", json=message_request(), trust_env=False)
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    assert texts(response) == ["Done."]
    (recorded,) = [json.loads(line) for line in record.read_text().splitlines()]
    assert json.loads(recorded["body"]) == message_request()
