"""`sandbox admin hosts` lists the hosts as a table or as JSON."""

import json

import pytest

from doubles.fake_api import json_response

HOST = {
    "name": "node-1",
    "state": "ready",
    "reason": "",
    "cpus": 8,
    "memory_bytes": 2**35,
    "running": 2,
    "task_ids": ["task-1", "task-2"],
    "last_contact_at": "2026-01-29T00:00:00.000Z",
    "version": "0.1.0",
    "draining_since": None,
}
LOST = {
    **HOST,
    **{"name": "node-2", "state": "unreachable", "reason": "No worker responds.", "running": 0, "task_ids": []},
    **{"cpus": None, "memory_bytes": None, "version": None, "last_contact_at": None},
}


@pytest.fixture
def list_hosts(api, run_cli):
    def run(hosts, *options):
        api.on("GET", "/hosts", json_response({"hosts": hosts}))
        return run_cli("admin", "hosts", *options)

    return run


def test_hosts_are_printed_as_a_table(list_hosts):
    result = list_hosts([HOST, LOST])
    assert (result.returncode, result.stderr) == (0, b"")
    head, first, second = (line.split() for line in result.stdout.decode().splitlines())
    assert head == ["NAME", "STATE", "CPUS", "MEMORY", "TASKS", "CONTACT", "VERSION", "REASON"]
    assert first[:6] == ["node-1", "ready", "8", "32.0", "GiB", "2"]
    assert first[-1] == "0.1.0"
    assert second == ["node-2", "unreachable", "0", "No", "worker", "responds."]


def test_drained_host_is_marked(list_hosts):
    drained = {**HOST, "draining_since": "2026-01-29T00:00:00.000Z"}
    earlier_version = {key: value for key, value in LOST.items() if key != "draining_since"}
    text = list_hosts([drained, earlier_version]).stdout.decode()
    assert "ready, drained" in text
    assert text.count("drained") == 1


def test_hosts_are_printed_as_json(list_hosts):
    assert json.loads(list_hosts([HOST], "-f", "json").stdout) == {"hosts": [HOST]}


def test_output_without_hosts_explains_when_hosts_are_listed(list_hosts):
    result = list_hosts([])
    assert (result.returncode, result.stdout) == (0, b"")
    assert b"No hosts yet." in result.stderr


def test_control_sequences_in_texts_of_hosts_are_escaped(list_hosts):
    result = list_hosts([{**HOST, "name": "\x1b]0;x\x07", "version": "\x1b[2J", "reason": "\x1b[2J"}])
    assert b"\x1b" not in result.stdout
