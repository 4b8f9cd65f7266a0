"""What people see in a narrow and in a wide window: no line that the terminal itself has to break."""

import json
import re

import pytest
from rich.cells import cell_len

from doubles.recorded_api import Answer, of_error, of_frames, of_json
from doubles.recorded_task import frames, status

UUID = "3f2c1d7e-2222-4222-8222-abcdefabcdef"
NAME = "Upgrade all dependencies of the billing service to their latest minor versions, and repair what breaks"
JAPANESE = "夜間のテストを直す" * 8
LABELS = {"team": "payments", "ticket": "OPS-1234", "environment": "staging", "note": "a\tb"}
REASON = "Cannot clone https://github.com/org/repository.git: it has no branch 'nowhere'; check repository.branch."
FAILED = {"state": "failed_preserved", "error": {"code": "clone_failed", "message": REASON}}
PATTERNS = "must be a glob relative to the workspace root, without '..' and without a '/' at its beginning"
MISTAKES = [
    {"field": f"lifecycle.artifact_patterns[{number}]", "rule": "format", "message": PATTERNS, "line": 9, "column": 5}
    for number in range(3)
]
REPOSITORY = {"url": "https://github.com/an-organisation/a-repository.git", "branch": "main", "commit": "c" * 40}
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
WIDTHS = pytest.mark.parametrize("width", [80, 140])


def task(state, task_id=UUID, **changes):
    definition = {"repository": REPOSITORY}
    return status(state, task_id, **{"name": NAME, "labels": LABELS, "definition": definition, **changes})


def artifact(name, path):
    kept = {"name": name, "path": path, "size_bytes": 123_456, "content_type": "application/x-ndjson"}
    return {**kept, "checksum": "", "created_at": "", "download_url": "", "contains_secret": path.startswith("d")}


@pytest.fixture
def full_api(api):
    """A server that has everything that is long."""
    tasks = [
        task("running"),
        task("failed_preserved", name=JAPANESE),
        task("pending", "upgrade-of-the-billing-service-2026-11-25", labels={}),
        task("completed", "t-1", name="Short"),
    ]
    page = {"tasks": tasks, "total_count": 400, "limit": 4, "offset": 0, "has_more": True, "next_cursor": "x"}
    kept = [artifact(f"{UUID}.patch", f".sandbox/{UUID}.patch"), artifact("a\tb.txt", "deep/" * 30 + "a\tb.txt")]
    story = [{**frame, "task_id": UUID} for frame in frames()]
    story[-3:-3] = [
        {**story[-3], "type": "egress_denied", "host": "h" * 30 + ".example.com", "port": 1, "reason": REASON}
    ]
    api.on("GET", "/tasks", of_json(page))
    api.on("POST", "/tasks", of_json({"task_id": UUID, "state": "pending"}, 202))
    api.on("GET", f"/tasks/{UUID}/artifacts", of_json({"task_id": UUID, "artifacts": kept}))
    api.on("GET", f"/tasks/{UUID}/logs", lambda asked: of_frames(story) if "follow" in asked.query else _logged(story))
    api.on("GET", f"/tasks/{UUID}/wait", of_json(task("completed")))
    api.on("GET", f"/tasks/{UUID}", of_json(task("running")))
    return api


def _logged(story):
    lines = []
    for frame in story:
        tag, content = frame.get("stream"), frame.get("data")
        event = json.dumps(frame, ensure_ascii=False) + "\n"
        lines.append(f"[{frame['timestamp']}] [{(tag or 'event').upper()}] {content or event}".encode())
    return Answer(200, lines)


@pytest.fixture
def screen(on_terminal, terminal, tmp_path):
    """Run `sandbox …` in a window; gives the lines that were shown, and checks that each fits."""
    (tmp_path / "task.yaml").write_text("version: '1'\n")

    def show(*arguments, width, codes=(0,)):
        terminal.resize(width)
        process = on_terminal(*arguments)
        text = terminal.read_to_end(process).decode()
        assert process.returncode in codes, text
        lines = [line for part in CONTROL.sub("", text).split("\n") for line in part.split("\r") if line]
        too_wide = [line for line in lines if cell_len(line) > width]
        assert lines
        assert not too_wide
        return lines

    return show


@WIDTHS
@pytest.mark.parametrize("form", ["text", "table"])
def test_the_list_of_tasks(full_api, screen, width, form):
    lines = screen("task", "list", "-f", form, width=width)
    assert sum(UUID in line for line in lines) == 2
    assert any("failed_preserved" in line and "夜間" in line and "…" in line for line in lines)
    assert "4 of 400 tasks; see more with --limit, or --all." in lines


@WIDTHS
def test_one_task(full_api, screen, width):
    full_api.on("GET", f"/tasks/{UUID}", of_json(task(**FAILED, name=f"{NAME} {JAPANESE}")))
    lines = screen("task", "status", UUID, width=width)
    assert f"Release it  sandbox task release {UUID}" in lines
    assert " ".join(line[12:] for line in lines).count(REASON) == 1
    assert all(line[:12].strip() or line[12] != " " for line in lines)


@WIDTHS
def test_a_task_that_is_watched(full_api, screen, width):
    lines = screen("task", "status", UUID, "--watch", width=width)
    assert any("running       Claude Code is working" in line for line in lines)
    assert any(line.endswith("    27 s · 4 tool calls · 26,911 tokens in, 590 out · $0.0895") for line in lines)


@WIDTHS
@pytest.mark.parametrize("follows", [(), ("--follow",)])
def test_the_story_of_a_task(full_api, screen, width, follows):
    lines = screen("task", "logs", UUID, *follows, width=width)
    assert any("▸ Read  src/app/parser.py  12 ms" in line for line in lines)


@WIDTHS
def test_a_task_that_is_submitted_and_followed(full_api, screen, width):
    lines = screen("task", "submit", "task.yaml", "--follow", width=width)
    assert lines[0] == UUID
    assert lines[-1] == f"  What it made:    sandbox task artifacts {UUID}"


@WIDTHS
def test_a_task_that_is_submitted_and_left_alone(full_api, screen, width):
    lines = screen("task", "submit", "task.yaml", width=width)
    assert lines[-1] == f"  Watch it: sandbox task status {UUID} --watch"


@WIDTHS
def test_a_task_that_fails_while_somebody_waits(full_api, screen, width):
    full_api.on("GET", f"/tasks/{UUID}/wait", of_json(task(**FAILED)))
    lines = screen("task", "submit", "task.yaml", "--wait", width=width, codes=(1,))
    assert f"  See what happened: sandbox task logs {UUID}" in lines
    assert f"Task {UUID} failed: {REASON} (clone_failed)" in " ".join(" ".join(lines).split())


@WIDTHS
def test_a_manifest_with_mistakes(full_api, screen, width):
    full_api.on("POST", "/tasks", of_error(400, "invalid_manifest", "It has 3 mistakes.", MISTAKES))
    lines = screen("task", "submit", "task.yaml", width=width, codes=(9,))
    assert sum(line.startswith("task.yaml:9:5: lifecycle.artifact_patterns[") for line in lines) == 3
    assert lines[-1] == "Error: task.yaml has 3 mistakes."


@WIDTHS
def test_a_manifest_with_mistakes_without_a_server(screen, width):
    lines = screen("task", "validate", "task.yaml", width=width, codes=(9,))
    assert lines[-1].startswith("Error: task.yaml has ")


@WIDTHS
def test_artifacts(full_api, screen, width):
    assert any(line.startswith(f"{UUID}.patch") for line in screen("task", "artifacts", UUID, width=width))


@WIDTHS
def test_a_server_that_is_not_there(screen, width):
    lines = screen("task", "list", "--server", "http://127.0.0.1:9", width=width, codes=(6,))
    assert any(line.endswith("sandbox serve") for line in lines)


@WIDTHS
def test_a_task_that_is_not_there(api, screen, width):
    screen("task", "status", "x" * 70, width=width, codes=(3,))


def test_what_works_on_this_machine(screen, environment):
    """In the narrow window, since what is too wide for the wide one is too wide for this."""
    environment["HOME"] = "/nonexistent"  # paths stay whole, and that of a test is long
    assert screen("doctor", width=80, codes=(0, 1))
