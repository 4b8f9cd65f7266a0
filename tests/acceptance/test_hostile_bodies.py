"""Malicious request bodies are rejected within a second, and their memory is freed."""

import gzip
import json
import socket
import time
from pathlib import Path

import pytest

from doubles.deployment import Deployment, reply_turn

MEBIBYTE = 1024**2
JSON, YAML = "application/json", "application/yaml"
RESPONSE_SECONDS_MAX = 5.0

MINIMAL = {
    "version": "1",
    "kind": "Task",
    "metadata": {"name": "A task"},
    "repository": {"url": "https://github.com/org/repo.git", "branch": "main"},
    "claude": {"prompt": "Do it."},
}
MINIMAL_JSON = json.dumps(MINIMAL).encode()


def bomb(levels, width):
    """Return YAML aliases that expand to `width ** levels` values."""
    lines = ["a0: &a0 [" + ", ".join(["x"] * width) + "]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [" + ", ".join([f"*a{level - 1}"] * width) + "]")
    return "\n".join(lines).encode()


def truncated(body):
    """Truncate the body to slightly less than the size limit."""
    return body[: MEBIBYTE - 64]


def hostile_bodies():
    """Return hostile bodies, keyed by name. This is a function, because building the bodies takes a second."""
    return {
        "alias bomb": (YAML, bomb(9, 9)),
        "merge key bomb": (YAML, b"a: &a {x: 1}\n" + b"".join(b"b%d: {<<: *a}\n" % n for n in range(10_000))),
        "an alias of itself": (YAML, b"a: &a [*a]\n"),
        "nested lists in YAML": (YAML, b"a: " + b"[" * 500_000 + b"]" * 500_000),
        "nested mappings in YAML": (YAML, truncated(b"{a: " * 300_000)),
        "nested lists in JSON": (JSON, b'{"a": ' + b"[" * 500_000 + b"]" * 500_000 + b"}"),
        "nested objects in JSON": (JSON, truncated(b'{"a":' * 250_000)),
        "a number with a million digits": (JSON, b'{"version": ' + b"9" * 1_000_000 + b"}"),
        "a number with a huge exponent": (YAML, b"version: 1e999999999\n"),
        "a NUL in YAML": (YAML, b"version: '1'\nkind: Ta\x00sk\n"),
        "an escaped NUL in JSON": (JSON, MINIMAL_JSON.replace(b"Do it.", b"Do \\u0000 it.")),
        "invalid UTF-8": (YAML, b"\xff\xfe\x00\x01" * 1000),
        "a lone surrogate": (JSON, MINIMAL_JSON.replace(b"A task", b"\\ud800")),
        "duplicate keys in JSON": (JSON, MINIMAL_JSON[:-1] + b', "claude": {"prompt": "Do something else."}}'),
        "duplicate keys in YAML": (YAML, MINIMAL_JSON[:-1] + b", kind: Task}"),
        "fifty thousand keys": (JSON, json.dumps({f"k{n}": n for n in range(50_000)}).encode()),
        "several documents": (YAML, b"---\nversion: '1'\n" * 30_000),
        "a tag for a Python object": (YAML, b"!!python/object/apply:os.system ['true']\n"),
        "90,000 directives": (YAML, b"%YAML 1.2\n" * 90_000),
        "a million anchors": (YAML, truncated(b"".join(b"- &a%d x\n" % n for n in range(80_000)))),
        "only quotes": (YAML, truncated(b'"' * MEBIBYTE)),
        "one long line of spaces": (YAML, truncated(b" " * MEBIBYTE) + b"x: [\n"),
        "gzip without a Content-Encoding": (JSON, gzip.compress(b" " * 100_000_000)),
    }


def resident_bytes(pid):
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    server = Deployment(tmp_path_factory.mktemp("hostile"))
    try:
        server.start_model(reply_turn())
        server.start_server()
        yield server
    finally:
        server.close()


def post(deployment, content, kind, **headers):
    """Return the response and the request's duration in seconds."""
    started_at = time.monotonic()
    response = deployment.http.post("/api/v1/tasks", content=content, headers={"Content-Type": kind, **headers})
    return response, time.monotonic() - started_at


def test_hostile_bodies_are_rejected_within_a_second_and_freed(deployment):
    post(deployment, b"{}", JSON)
    tasks_before = deployment.http.get("/api/v1/tasks").json()["total_count"]
    before = resident_bytes(deployment.server.pid)
    durations, bodies = {}, hostile_bodies()
    for _ in range(2):
        for name, (kind, body) in bodies.items():
            response, seconds = post(deployment, body, kind)
            assert response.status_code == 400, (name, response.text[:500])
            assert response.json()["error"] == "invalid_manifest", name
            assert response.json()["details"], name
            assert len(response.content) < 100_000, name
            durations[name] = max(durations.get(name, 0), seconds)
    assert {name: seconds for name, seconds in durations.items() if seconds > RESPONSE_SECONDS_MAX} == {}
    grown = resident_bytes(deployment.server.pid) - before
    assert grown < 32 * MEBIBYTE, f"{grown / MEBIBYTE:.0f} MiB more"
    assert deployment.http.get("/api/v1/health/ready").status_code == 200
    assert deployment.http.get("/api/v1/tasks").json()["total_count"] == tasks_before


def test_only_bodies_above_the_size_limit_are_rejected(deployment):
    padding = MEBIBYTE - len(MINIMAL_JSON)
    response, seconds = post(deployment, MINIMAL_JSON[:-1] + b" " * (padding + 1) + b"}", JSON)
    assert (response.status_code, response.json()["error"]) == (413, "payload_too_large")
    assert seconds < RESPONSE_SECONDS_MAX
    chunks = (b" " * 65_536 for _ in range(1000))
    response, seconds = post(deployment, chunks, JSON)
    assert (response.status_code, seconds < RESPONSE_SECONDS_MAX) == (413, True)
    response, _ = post(deployment, MINIMAL_JSON[:-1] + b" " * padding + b"}", JSON)
    assert response.status_code == 202, response.text
    deployment.wait(response.json()["task_id"])


def test_content_length_over_the_limit_is_rejected_before_the_body(deployment):
    host, port = deployment.server.ready_message["http"].removeprefix("http://").rsplit(":", 1)
    begin = time.monotonic()
    with socket.create_connection((host, int(port)), 5) as connection:
        head = f"POST /api/v1/tasks HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Length: 999999999999\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    assert time.monotonic() - begin < RESPONSE_SECONDS_MAX


def test_slow_bodies_do_not_delay_other_requests(deployment):
    host, port = deployment.server.ready_message["http"].removeprefix("http://").rsplit(":", 1)
    head = f"POST /api/v1/tasks HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Length: 1000000\r\n\r\n"
    slow = [socket.create_connection((host, int(port)), 5) for _ in range(50)]
    try:
        for connection in slow:
            connection.sendall(head.encode() + b"{")
        response, seconds = post(deployment, b"{}", JSON)
        assert (response.status_code, seconds < RESPONSE_SECONDS_MAX) == (400, True)
    finally:
        for connection in slow:
            connection.close()


def test_all_validation_errors_are_listed_for_every_body_format(deployment):
    wrong = {**MINIMAL, "kind": "Pod", "metadata": {"name": ""}, "vm": {"cpus": 0, "memory": "8 GB"}, "extra": 1}
    fields = {"kind", "metadata.name", "vm.cpus", "vm.memory", "extra"}
    text = json.dumps(wrong)
    for kind, body in (
        (JSON, text),
        (YAML, text),
        (JSON, json.dumps({"manifest": wrong})),
        (JSON, json.dumps({"manifest_yaml": text})),
        ("text/plain", text),
    ):
        response, seconds = post(deployment, body.encode(), kind)
        assert response.status_code == 400
        assert {detail["field"].removeprefix("manifest.") for detail in response.json()["details"]} == fields, kind
        assert seconds < RESPONSE_SECONDS_MAX
