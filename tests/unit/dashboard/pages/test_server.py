"""The server page."""

import dataclasses
import re
import threading
from datetime import UTC, datetime, timedelta
from urllib.parse import quote

import pytest

from doubles import fake_tasks
from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from doubles.fake_token_store import FakeTokenStore
from sandbox.dashboard.pages import server
from sandbox.interfaces.placement import HostState, HostStatus
from sandbox.interfaces.server_services import HostWithTasks, LoadSample, Occupancy
from sandbox.model import events as e
from sandbox.model.display_text import format_duration
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.fixed_limits import LOAD_SAMPLE_INTERVAL_SECONDS


@pytest.mark.parametrize(("count", "is_marked_partial"), [(2, False), (3, True)])
def test_truncated_statistics_are_marked(pages, monkeypatch, count, is_marked_partial):
    monkeypatch.setattr(fake_tasks, "START_TIME", datetime.now(UTC) - timedelta(hours=1))
    monkeypatch.setattr(server, "STATS_TASKS_MAX", 2)
    for number in range(count):
        pages.tasks.add(f"task-{number}", *TO_RUNNING, *TO_COMPLETED)
    text = pages.get("/server").text
    assert '<dd id="outcomes">2 of 2</dd>' in text
    assert ("only the latest 2" in text) == is_marked_partial


@pytest.mark.parametrize(
    ("outcomes", "shown"),
    [
        ("", "–"),
        ("done", "1 of 1"),
        ("done failed cancelled cancelled", '1 of 4 <span class="muted">1 failed, 2 cancelled</span>'),
        ("failed", '0 of 1 <span class="muted">1 failed</span>'),
    ],
)
def test_outcomes_of_the_last_day_are_counted_separately(pages, monkeypatch, outcomes, shown):
    monkeypatch.setattr(fake_tasks, "START_TIME", datetime.now(UTC) - timedelta(hours=1))
    failed = e.AgentExited(1, failure=Failure(FailureCode.AGENT_FAILED, "It broke."))
    events = {
        "done": TO_COMPLETED,
        "failed": (failed, e.TaskFinished()),
        "cancelled": (e.CancelRequested("", force=False), e.AgentExited(143), e.TaskFinished()),
    }
    for number, outcome in enumerate(outcomes.split()):
        pages.tasks.add(f"task-{number}", *TO_RUNNING, *events[outcome])
    text = pages.get("/server").text
    assert f'<dd id="outcomes">{shown}</dd>' in text
    assert "Index" not in text, "the index is mentioned only if it is not readable"


def test_median_uses_the_durations_that_other_pages_show(pages, monkeypatch):
    """The wait for capacity and the clone are not part of a task's duration."""
    monkeypatch.setattr(fake_tasks, "START_TIME", datetime.now(UTC) - timedelta(hours=1))
    pages.tasks.event_interval = timedelta(seconds=10)
    task = pages.tasks.add("task-001", *TO_RUNNING, *TO_COMPLETED)
    assert task.duration_seconds(datetime.now(UTC)) < (task.state_changed_at - task.created_at).total_seconds()
    duration = format_duration(task.duration_seconds(datetime.now(UTC)))
    assert f'<dd id="median">{duration}</dd>' in pages.get("/server").text
    assert re.search(rf">Duration</dt><dd>{duration}</dd>", pages.get("/tasks/task-001").text)
    for path in ("/", "/server", "/tasks/task-001"):
        assert 'title="From the first start of the agent to the end of the task' in pages.get(path).text


def test_overcommitted_capacity_shows_its_factor(pages):
    occupancy = Occupancy(*[4] * len(dataclasses.fields(Occupancy)))
    pages.tasks.health_report = dataclasses.replace(pages.tasks.health_report, occupancy=occupancy)
    assert "(×" not in pages.get("/server").text
    context = pages.app.state.context
    settings = dataclasses.replace(context.settings, overcommit={"cpus": 1.0, "memory": 1.5, "disk": 4.0})
    object.__setattr__(context, "settings", settings)
    text = pages.get("/server").text
    assert re.findall(r"\(×([0-9.]+)\)", text) == ["1.5", "4"]
    assert "lets tasks reserve more than the machine has" in text


def test_hosts_page_without_a_cluster_lists_only_this_machine(pages):
    """The server page does not link to the hosts page."""
    pages.tasks.hosts = [HostWithTasks(pages.tasks.hosts[0].status, ["task-1"])]
    text = pages.get("/hosts").text
    assert re.findall(r'<th scope="row"[^>]*>([^<]*)</th>', text) == ["build-1"]
    assert "All tasks run on this machine." in text
    assert '<td class="number" data-name="Memory">32.0 GiB</td>' in text
    assert "Last contact" not in text
    assert '<a class="label" id="host-task-task-1" href="/tasks/task-1"' in text
    assert "/hosts" not in pages.get("/server").text


def test_hosts_page_of_a_cluster_shows_states_and_reasons_and_contacts(pages):
    at = datetime(2026, 1, 29, 10, 10, 15, tzinfo=UTC)
    ids = [f"task-{number}" for number in range(server.TASK_LINKS_MAX + 2)]
    lost = HostStatus("node-2", HostState.UNREACHABLE, "No worker on the host is <responding>.", last_contact_at=at)
    pages.tasks.hosts = [
        HostWithTasks(HostStatus("node-1", HostState.READY, cpus=8, last_contact_at=at), ids),
        HostWithTasks(lost, []),
        HostWithTasks(HostStatus("node-3", HostState.IDLE, "No worker is running on the host.", draining_since=at), []),
    ]
    pages.tasks.has_cluster = True
    text = pages.get("/hosts").text
    assert re.findall(r'<th scope="row"[^>]*>([^<]*)</th>', text) == ["node-1", "node-2", "node-3"]
    assert re.findall(r'<span class="pill (\w+)">', text) == ["done", "failed", "waits", "waits"]
    assert "No worker on the host is &lt;responding&gt;." in text
    assert text.count('<time datetime="2026-01-29T10:10:15.000Z" data-ago>') == 3
    assert text.count('<span class="pill waits">drained</span>') == 1
    assert (text.count('class="label" id="host-task-'), "and 2 more" in text) == (server.TASK_LINKS_MAX, True)
    count = '<dd id="host-count"><a href="/hosts">3</a> <span class="muted">1 unreachable</span></dd>'
    assert count in pages.get("/server").text
    pages.tasks.hosts = []
    assert "No hosts yet." in pages.get("/hosts").text


def load_sample(second: int, **fields: int) -> LoadSample:
    values = dict.fromkeys((field.name for field in dataclasses.fields(LoadSample)), 1) | fields
    return LoadSample(**{**values, "at": datetime.fromtimestamp(second, UTC), "cpu_percent": None})


def test_only_load_samples_after_the_given_time_are_sent(pages):
    pages.tasks.samples = [load_sample(10, running=3), load_sample(25, running=4)]
    body = pages.get("/server/load").json()
    assert body["interval_seconds"] == LOAD_SAMPLE_INTERVAL_SECONDS
    assert [(sample["at"], sample["running"], sample["cpu_percent"]) for sample in body["samples"]] == [
        (10_000, 3, None),
        (25_000, 4, None),
    ]
    assert [sample["at"] for sample in pages.get("/server/load?after=10000").json()["samples"]] == [25_000]


def test_body_is_built_only_for_the_load_samples_that_are_sent(pages, monkeypatch):
    build, built = server._sample_body, []
    monkeypatch.setattr(server, "_sample_body", lambda sample: built.append(sample) or build(sample))
    samples = pages.tasks.samples = [load_sample(second) for second in range(10, 100, 15)]
    assert len(pages.get("/server/load?after=70000").json()["samples"]) == 1
    assert built == samples[-1:]


def test_load_samples_are_encoded_in_another_thread(pages, monkeypatch):
    build, load_samples = server._sample_body, pages.tasks.load_samples
    encoding_threads, loop_threads = [], []
    monkeypatch.setattr(
        server, "_sample_body", lambda sample: encoding_threads.append(threading.current_thread()) or build(sample)
    )
    monkeypatch.setattr(
        pages.tasks, "load_samples", lambda: loop_threads.append(threading.current_thread()) or load_samples()
    )
    pages.tasks.samples = [load_sample(10)]
    assert len(pages.get("/server/load").json()["samples"]) == 1
    assert (len(encoding_threads), len(loop_threads)) == (1, 1)
    assert encoding_threads != loop_threads


@pytest.mark.parametrize("after", ["-1", "x", "1" * 16, "\u0663", "1.5"])
def test_malformed_times_are_rejected(pages, after):
    assert pages.get(f"/server/load?after={quote(after)}", accept="application/json").status_code == 400


def test_load_endpoint_needs_a_token_on_a_server_with_tokens(pages_with_tokens):
    pages = pages_with_tokens(FakeTokenStore(bob="viewer"))
    assert pages.get("/server/load", accept="application/json").status_code == 401
    assert pages.get("/server/load", authorization="Bearer bob").status_code == 200
