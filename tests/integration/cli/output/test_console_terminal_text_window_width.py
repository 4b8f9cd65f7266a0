"""Text output fits narrow and wide windows: the terminal never wraps a line."""

import json
import re

import pytest
from rich.cells import cell_len

from doubles.fake_api import ApiResponse, error_response, json_response, sse_response
from doubles.sample_task import task_events, task_status

UUID = "3f2c1d7e-2222-4222-8222-abcdefabcdef"
NAME = "Upgrade all dependencies of the billing service to their latest minor versions, and repair what breaks"
JAPANESE = "夜間のテストを直す" * 8
LABELS = {"team": "payments", "ticket": "OPS-1234", "environment": "staging", "note": "a\tb"}
REASON = "Cannot clone https://github.com/org/repository.git: it has no branch 'nowhere'; check repository.branch."
REMEDY = {"text": "Check repository.branch.", "field": "repository.branch", "overrides": []}
FAILED = {"state": "failed_preserved", "error": {"code": "clone_failed", "message": REASON, "remedy": REMEDY}}
PATTERN_ERROR = "must be a glob relative to the workspace root, without '..' and without a '/' at its beginning"
FIELD_ERRORS = [
    {
        "field": f"lifecycle.artifact_patterns[{number}]",
        "rule": "format",
        "message": PATTERN_ERROR,
        "line": 9,
        "column": 5,
    }
    for number in range(3)
]
REPOSITORY = {"url": "https://github.com/an-organization/a-repository.git", "branch": "main", "commit": "c" * 40}
CONTROL_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
WIDTHS = pytest.mark.parametrize("width", [80, 140])


def task(state, task_id=UUID, **changes):
    definition = {"repository": REPOSITORY}
    return task_status(state, task_id, **{"name": NAME, "labels": LABELS, "definition": definition, **changes})


def artifact(name, path):
    info = {"name": name, "path": path, "size_bytes": 123_456, "content_type": "application/x-ndjson"}
    return {**info, "checksum": "", "created_at": "", "download_url": "", "contains_secret": path.startswith("d")}


@pytest.fixture
def api_with_long_texts(api):
    """A server with long names, ids and messages."""
    tasks = [
        task("running"),
        task("failed_preserved", name=JAPANESE),
        task("pending", "upgrade-of-the-billing-service-2026-11-25", labels={}),
        task("completed", "t-1", name="Short"),
    ]
    page = {"tasks": tasks, "total_count": 400, "limit": 4, "offset": 0, "has_more": True, "next_cursor": "x"}
    artifacts = [artifact(f"{UUID}.patch", f".sandbox/{UUID}.patch"), artifact("a\tb.txt", "deep/" * 30 + "a\tb.txt")]
    events = [{**event, "task_id": UUID} for event in task_events()]
    events[-3:-3] = [
        {**events[-3], "type": "egress_denied", "host": "h" * 30 + ".example.com", "port": 1, "reason": REASON}
    ]
    api.on("GET", "/tasks", json_response(page))
    api.on("POST", "/tasks", json_response({"task_id": UUID, "state": "pending"}, 202))
    api.on("GET", f"/tasks/{UUID}/artifacts", json_response({"task_id": UUID, "artifacts": artifacts}))
    api.on(
        "GET",
        f"/tasks/{UUID}/logs",
        lambda request: sse_response(events) if "follow" in request.query else _log_of(events),
    )
    api.on("GET", f"/tasks/{UUID}/wait", json_response(task("completed")))
    api.on("GET", f"/tasks/{UUID}", json_response(task("running")))
    return api


def _log_of(events):
    lines = []
    for event in events:
        tag, content = event.get("stream"), event.get("data")
        rendered_event = json.dumps(event, ensure_ascii=False) + "\n"
        lines.append(f"[{event['timestamp']}] [{(tag or 'event').upper()}] {content or rendered_event}".encode())
    return ApiResponse(200, lines)


@pytest.fixture
def screen(on_terminal, terminal, tmp_path):
    """Run `sandbox …` in a window of a given width; return the lines and check that each one fits."""
    (tmp_path / "task.yaml").write_text("version: '1'\n")

    def show(*arguments, width, codes=(0,)):
        terminal.resize(width)
        process = on_terminal(*arguments)
        text = terminal.read_to_end(process).decode()
        assert process.returncode in codes, text
        lines = [line for part in CONTROL_SEQUENCE.sub("", text).split("\n") for line in part.split("\r") if line]
        too_wide = [line for line in lines if cell_len(line) > width]
        assert lines
        assert not too_wide
        return lines

    return show


@WIDTHS
@pytest.mark.parametrize("output_format", ["text", "table"])
def test_task_list_fits_the_window(api_with_long_texts, screen, width, output_format):
    lines = screen("task", "list", "-f", output_format, width=width)
    assert sum(UUID[:8] in line for line in lines) == 2
    assert any("failed, preserved" in line and "夜間" in line and "…" in line for line in lines)
    assert "4 of 400 tasks; see more with --limit, or --all." in lines


@WIDTHS
def test_task_status_fits_the_window(api_with_long_texts, screen, width):
    api_with_long_texts.on("GET", f"/tasks/{UUID}", json_response(task(**FAILED, name=f"{NAME} {JAPANESE}")))
    lines = screen("task", "status", UUID, width=width)
    assert lines[-1] == f"Release it  sandbox task release {UUID[:8]}"
    assert " ".join(line[12:] for line in lines).count(REASON) == 1
    assert all(line[:12].strip() or line[12] != " " for line in lines)


@WIDTHS
def test_watched_task_fits_the_window(api_with_long_texts, screen, width):
    lines = screen("task", "status", UUID, "--watch", width=width)
    assert any("running           Claude Code is working" in line for line in lines)
    assert any(line.endswith("    35 s · 4 tool calls · 26,911 tokens in, 590 out · $0.0895") for line in lines)


@WIDTHS
@pytest.mark.parametrize("follow", [(), ("--follow",)])
def test_task_logs_fit_the_window(api_with_long_texts, screen, width, follow):
    lines = screen("task", "logs", UUID, *follow, width=width)
    assert any("▸ Read  src/app/parser.py  12 ms" in line for line in lines)


@WIDTHS
def test_followed_submission_fits_the_window(api_with_long_texts, screen, width):
    lines = screen("task", "submit", "task.yaml", "--follow", width=width)
    assert lines[0] == UUID
    assert lines[-1] == f"  Artifacts: sandbox task artifacts {UUID[:8]}"


@WIDTHS
def test_submission_fits_the_window(api_with_long_texts, screen, width):
    lines = screen("task", "submit", "task.yaml", width=width)
    assert lines[-2] == f"  Watch it:  sandbox task status {UUID[:8]} --watch"
    assert lines[-1].startswith("  Dashboard: http://127.0.0.1:")
    assert lines[-1].endswith(f"/tasks/{UUID}")


@WIDTHS
def test_failure_of_an_awaited_task_fits_the_window(api_with_long_texts, screen, width):
    api_with_long_texts.on("GET", f"/tasks/{UUID}/wait", json_response(task(**FAILED)))
    lines = screen("task", "submit", "task.yaml", "--wait", width=width, codes=(1,))
    shown_id = UUID[:8]
    assert f"  Logs:              sandbox task logs {shown_id}" in lines
    assert f"  Rerun:             sandbox task rerun {shown_id} --set repository.branch=…" in lines
    assert f"Task {UUID} failed: {REASON} (clone_failed)" in " ".join(" ".join(lines).split())


@WIDTHS
def test_invalid_manifest_errors_fit_the_window(api_with_long_texts, screen, width):
    api_with_long_texts.on(
        "POST", "/tasks", error_response(400, "invalid_manifest", "The manifest has 3 errors.", FIELD_ERRORS)
    )
    lines = screen("task", "submit", "task.yaml", width=width, codes=(9,))
    assert sum(line.startswith("task.yaml:9:5: lifecycle.artifact_patterns[") for line in lines) == 3
    assert lines[-1] == "Error: task.yaml has 3 errors."


@WIDTHS
def test_offline_validation_errors_fit_the_window(screen, width):
    lines = screen("task", "validate", "task.yaml", width=width, codes=(9,))
    assert lines[-1].startswith("Error: task.yaml has ")


@WIDTHS
def test_artifact_list_fits_the_window(api_with_long_texts, screen, width):
    assert any(line.startswith(f"{UUID}.patch") for line in screen("task", "artifacts", UUID, width=width))


@WIDTHS
def test_unreachable_server_error_fits_the_window(screen, width):
    lines = screen("task", "list", "--server", "http://127.0.0.1:9", width=width, codes=(6,))
    assert any(line.endswith("sandbox serve") for line in lines)


@WIDTHS
def test_unknown_task_error_fits_the_window(api, screen, width):
    screen("task", "status", "x" * 70, width=width, codes=(3,))


@pytest.mark.parametrize("width", [60, 80, 140])
def test_help_fits_the_window(screen, width):
    lines = screen("task", "status", "--help", width=width)
    assert "    sandbox task status 5e173eb5 --watch" in lines
    assert max(map(cell_len, lines)) > min(width, 80) - 20


@pytest.mark.parametrize("width", [60, 80, 140])
def test_tasks_of_an_ambiguous_prefix_fit_the_window(api, screen, width):
    tasks = [task("running"), task("failed_preserved", UUID.replace("2222", "3333"), name=JAPANESE)]
    api.on("GET", "/tasks", json_response({"tasks": tasks, "total_count": 2, "next_cursor": None}))
    lines = screen("task", "cancel", UUID[:6], width=width, codes=(2,))
    assert lines[-1].endswith("…")
    assert f"  {UUID}  running            {NAME[0] if width > 60 else '…'}" in "\n".join(lines)


@pytest.mark.parametrize("width", [60, 80, 140])
def test_login_messages_fit_the_window(api, screen, width):
    api.on("GET", "/tasks", json_response({"tasks": [], "total_count": 0}))
    lines = screen("login", api.url, "--context", "x" * 20, width=width)
    assert " ".join(line.strip() for line in lines).startswith(
        f"Logged in to {api.url}. The current context is now xxxx"
    )


def test_doctor_output_fits_the_window(screen, environment):
    """Output that fits the narrow window also fits the wide one."""
    environment["HOME"] = "/nonexistent"  # paths are not shortened, and the home directory of a test has a long path
    assert screen("doctor", width=80, codes=(0, 1))
