"""Bodies that want to hurt the server: each is refused within a second, and the memory that it took is given back."""

import gzip
import json
import socket
import time
from pathlib import Path

import pytest

from doubles.live_server import World, says

MEBIBYTE = 1024**2
JSON, YAML = "application/json", "application/yaml"
SECONDS = 1.0

MINIMAL = {
    "version": "1",
    "kind": "Task",
    "metadata": {"name": "A task"},
    "repository": {"url": "https://github.com/org/repo.git", "branch": "main"},
    "claude": {"prompt": "Do it."},
}
MINIMAL_JSON = json.dumps(MINIMAL).encode()


def bomb(levels, width):
    """YAML aliases that stand for width ** levels values."""
    lines = ["a0: &a0 [" + ", ".join(["x"] * width) + "]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [" + ", ".join([f"*a{level - 1}"] * width) + "]")
    return "\n".join(lines).encode()


def filled(body):
    """Up to the largest size that is read at all."""
    return body[: MEBIBYTE - 64]


def hostile():
    """By name; making them takes a second, which only who plays them is to spend."""
    return {
        "a bomb of aliases": (YAML, bomb(9, 9)),
        "a bomb of merge keys": (YAML, b"a: &a {x: 1}\n" + b"".join(b"b%d: {<<: *a}\n" % n for n in range(10_000))),
        "an alias of itself": (YAML, b"a: &a [*a]\n"),
        "lists in lists in YAML": (YAML, b"a: " + b"[" * 500_000 + b"]" * 500_000),
        "mappings in mappings in YAML": (YAML, filled(b"{a: " * 300_000)),
        "lists in lists in JSON": (JSON, b'{"a": ' + b"[" * 500_000 + b"]" * 500_000 + b"}"),
        "objects in objects in JSON": (JSON, filled(b'{"a":' * 250_000)),
        "a number of a million digits": (JSON, b'{"version": ' + b"9" * 1_000_000 + b"}"),
        "a number with a huge exponent": (YAML, b"version: 1e999999999\n"),
        "a NUL in YAML": (YAML, b"version: '1'\nkind: Ta\x00sk\n"),
        "an escaped NUL in JSON": (JSON, MINIMAL_JSON.replace(b"Do it.", b"Do \\u0000 it.")),
        "bytes that are no UTF-8": (YAML, b"\xff\xfe\x00\x01" * 1000),
        "half a pair of surrogates": (JSON, MINIMAL_JSON.replace(b"A task", b"\\ud800")),
        "duplicate keys in JSON": (JSON, MINIMAL_JSON[:-1] + b', "claude": {"prompt": "Do something else."}}'),
        "duplicate keys in YAML": (YAML, MINIMAL_JSON[:-1] + b", kind: Task}"),
        "fifty thousand keys": (JSON, json.dumps({f"k{n}": n for n in range(50_000)}).encode()),
        "several documents": (YAML, b"---\nversion: '1'\n" * 30_000),
        "a tag that makes an object": (YAML, b"!!python/object/apply:os.system ['true']\n"),
        "directives without end": (YAML, b"%YAML 1.2\n" * 90_000),
        "a million anchors": (YAML, filled(b"".join(b"- &a%d x\n" % n for n in range(80_000)))),
        "nothing but quotes": (YAML, filled(b'"' * MEBIBYTE)),
        "one long line of spaces": (YAML, filled(b" " * MEBIBYTE) + b"x: [\n"),
        "gzip that nobody asked for": (JSON, gzip.compress(b" " * 100_000_000)),
    }


def resident_bytes(pid):
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("hostile"))
    try:
        world.start_model(says())
        world.start_server()
        yield world
    finally:
        world.close()


def post(machine, content, kind, **headers):
    """The answer, and how many seconds it took."""
    begin = time.monotonic()
    answer = machine.http.post("/api/v1/tasks", content=content, headers={"Content-Type": kind, **headers})
    return answer, time.monotonic() - begin


def test_every_hostile_body_is_refused_within_a_second_and_leaves_no_memory_behind(machine):
    post(machine, b"{}", JSON)
    tasks_before = machine.http.get("/api/v1/tasks").json()["total_count"]
    before = resident_bytes(machine.server.pid)
    told, bodies = {}, hostile()
    for _ in range(2):
        for name, (kind, body) in bodies.items():
            answer, seconds = post(machine, body, kind)
            assert answer.status_code == 400, (name, answer.text[:500])
            assert answer.json()["error"] == "invalid_manifest", name
            assert answer.json()["details"], name
            assert len(answer.content) < 100_000, name
            told[name] = max(told.get(name, 0), seconds)
    assert {name: seconds for name, seconds in told.items() if seconds > SECONDS} == {}
    grown = resident_bytes(machine.server.pid) - before
    assert grown < 32 * MEBIBYTE, f"{grown / MEBIBYTE:.0f} MiB more"
    assert machine.http.get("/api/v1/health/ready").status_code == 200
    assert machine.http.get("/api/v1/tasks").json()["total_count"] == tasks_before


def test_one_byte_over_the_bound_is_refused_and_the_bound_itself_is_read(machine):
    room = MEBIBYTE - len(MINIMAL_JSON)
    answer, seconds = post(machine, MINIMAL_JSON[:-1] + b" " * (room + 1) + b"}", JSON)
    assert (answer.status_code, answer.json()["error"]) == (413, "payload_too_large")
    assert seconds < SECONDS
    chunks = (b" " * 65_536 for _ in range(1000))
    answer, seconds = post(machine, chunks, JSON)
    assert (answer.status_code, seconds < SECONDS) == (413, True)
    answer, _ = post(machine, MINIMAL_JSON[:-1] + b" " * room + b"}", JSON)
    assert answer.status_code == 202, answer.text
    machine.wait(answer.json()["task_id"])


def test_a_body_that_is_announced_but_too_large_is_refused_before_it_comes(machine):
    host, port = machine.server.said["http"].removeprefix("http://").rsplit(":", 1)
    begin = time.monotonic()
    with socket.create_connection((host, int(port)), 5) as connection:
        head = f"POST /api/v1/tasks HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Length: 999999999999\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    assert time.monotonic() - begin < SECONDS


def test_bodies_that_drip_hold_nobody_else_up(machine):
    host, port = machine.server.said["http"].removeprefix("http://").rsplit(":", 1)
    head = f"POST /api/v1/tasks HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Length: 1000000\r\n\r\n"
    slow = [socket.create_connection((host, int(port)), 5) for _ in range(50)]
    try:
        for connection in slow:
            connection.sendall(head.encode() + b"{")
        answer, seconds = post(machine, b"{}", JSON)
        assert (answer.status_code, seconds < SECONDS) == (400, True)
    finally:
        for connection in slow:
            connection.close()


def test_all_mistakes_are_named_at_once_in_whatever_form_the_body_comes(machine):
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
        answer, seconds = post(machine, body.encode(), kind)
        assert answer.status_code == 400
        assert {detail["field"].removeprefix("manifest.") for detail in answer.json()["details"]} == fields, kind
        assert seconds < SECONDS
