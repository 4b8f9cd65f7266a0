"""The page of one task: its actions and links to related tasks."""

import re

import msgspec
import pytest

from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from doubles.fake_token_store import FakeTokenStore
from doubles.manifests import manifest
from sandbox.interfaces.server_services import Inheritance
from sandbox.model import events as e
from sandbox.model.artifacts import Artifact, DiffStatistics
from sandbox.model.failure import Failure, FailureCode

PARENT = e.Parent("task-001", "0" * 40, ())
PATCH = Artifact("task-001.patch", ".sandbox/task-001.patch", 9, "text/x-diff", "sha256:" + "0" * 64)

REPORT = Artifact("report.md", "report.md", 9, "text/markdown", "sha256:" + "0" * 64)

FAILURE = Failure(FailureCode.AGENT_FAILED, "It failed.")


def add_ended(tasks, task_id="task-001", *events, parent=None, rerun_of=None):
    tasks._apply(task_id, e.TaskSubmitted(task_id, manifest(task_id), None, parent, rerun_of))
    tasks.record(task_id, *TO_RUNNING, *events, *TO_COMPLETED)


@pytest.mark.parametrize("has_patch", [True, False])
def test_change_is_offered_if_the_task_can_be_continued(pages, has_patch):
    add_ended(pages.tasks, "task-001", *([e.ArtifactCollected(PATCH)] if has_patch else []))
    pages.tasks.inheritances["task-001"] = Inheritance(PARENT, {})
    text = pages.get("/tasks/task-001").text
    assert ('data-action="continue"' in text, "data-refusal" in text) == (True, False)


@pytest.mark.parametrize(
    ("events", "parent", "is_offered"),
    [
        ([], None, False),
        ([e.Progress(turns=1)], None, True),
        ([e.ArtifactCollected(PATCH)], None, True),
        ([], PARENT, True),
    ],
    ids=["nothing", "a conversation", "changes", "an earlier task"],
)
def test_change_of_a_cancelled_task_is_offered_if_earlier_work_exists(pages, events, parent, is_offered):
    pages.tasks._apply("task-001", e.TaskSubmitted("task-001", manifest("task-001"), None, parent, None))
    cancelled = e.CancelRequested("", force=False)
    pages.tasks.record("task-001", *TO_RUNNING, *events, cancelled, e.AgentExited(143), e.TaskFinished())
    pages.tasks.inheritances["task-001"] = Inheritance(PARENT, {})
    text = pages.get("/tasks/task-001").text
    assert ('data-action="continue"' in text, 'id="run-again"' in text) == (is_offered, True)


def test_change_is_not_offered_without_a_clone_or_a_patch(pages):
    add_ended(pages.tasks)
    text = pages.get("/tasks/task-001").text
    assert ('data-action="continue"' in text, 'id="run-again"' in text) == (False, True)


@pytest.mark.parametrize(
    ("code", "link"),
    [
        (FailureCode.TIMEOUT, "/submit?from=task-001&amp;field=lifecycle.timeout"),
        (FailureCode.AGENT_FAILED, None),
    ],
)
def test_failure_that_a_setting_would_prevent_links_to_the_settings_field(pages, code, link):
    failed = e.AgentExited(1, None, Failure(code, "It failed; raise lifecycle.timeout."))
    pages.tasks.add("task-001", *TO_RUNNING, failed, e.TaskFinished())
    text = pages.get("/tasks/task-001").text
    found = re.search(r'class="button primary" id="fix" href="([^"]*)">Run again with more time<', text)
    assert (found and found[1]) == link
    assert ('class="button primary" id="run-again"' in text) == (link is None)


@pytest.mark.parametrize(
    ("message", "is_offered"),
    [
        ("The sandbox ran out of memory; raise vm.memory.", True),
        ("The sandbox had 9000 locks on files; the limit is 8192. Release unused ones.", False),
    ],
)
def test_more_memory_is_offered_only_if_the_memory_was_the_limit(pages, message, is_offered):
    failed = e.AgentExited(1, None, Failure(FailureCode.OUT_OF_MEMORY, message))
    pages.tasks.add("task-001", *TO_RUNNING, failed, e.TaskFinished())
    text = pages.get("/tasks/task-001").text
    assert ("Run again with more memory" in text) == is_offered
    assert ('class="button primary" id="run-again"' in text) != is_offered


@pytest.mark.parametrize(("code", "is_in_menu"), [(FailureCode.TIMEOUT, True), (FailureCode.AGENT_FAILED, False)])
def test_a_button_for_another_setting_moves_other_actions_into_the_menu(pages, code, is_in_menu):
    failed = e.AgentExited(1, None, Failure(code, "It failed; raise lifecycle.timeout."))
    pages.tasks.add("task-001", *TO_RUNNING, failed, e.ArtifactCollected(PATCH), e.TaskFinished())
    text = pages.get("/tasks/task-001").text
    for name in ("copy-apply", "run-again"):
        [at] = [match.start() for match in re.finditer(f'id="{name}"', text)]
        assert (at > text.index('id="copy-menu"')) == is_in_menu


def test_reason_is_on_the_page_if_a_patch_cannot_be_continued(pages):
    add_ended(pages.tasks, "task-001", e.ArtifactCollected(PATCH))
    text = pages.get("/tasks/task-001").text
    assert 'data-action="continue"' in text
    assert 'data-refusal="Task task-001 cannot be continued: it ended without a patch' in text


def test_operators_can_delete_a_task_that_has_ended(pages_with_tokens):
    pages = pages_with_tokens(FakeTokenStore(ann="operator", bob="viewer"))
    add_ended(pages.tasks)
    pages.tasks.add("works", *TO_RUNNING)
    for name, task_id, is_offered in (("ann", "task-001", True), ("bob", "task-001", False), ("ann", "works", False)):
        text = pages.get(f"/tasks/{task_id}", authorization=f"Bearer {name}").text
        assert ('data-action="delete"' in text) == is_offered, (name, task_id)


@pytest.mark.parametrize(
    ("artifacts", "is_preserved", "removed"),
    [
        ((), False, "the conversation and the output"),
        ((REPORT,), False, "the conversation, the output and all artifacts"),
        ((PATCH, REPORT), False, "the conversation, the output, the patch and all other artifacts"),
        ((), True, "the conversation, the output and the preserved sandbox"),
    ],
)
def test_confirmation_names_what_the_deletion_removes(pages, artifacts, is_preserved, removed):
    kept = manifest("task-001", lifecycle={"failure_action": "preserve"})
    pages.tasks._apply("task-001", e.TaskSubmitted("task-001", kept, None))
    exited = e.AgentExited(1, None, Failure(FailureCode.AGENT_FAILED, "It failed."))
    pages.tasks.record("task-001", *TO_RUNNING, *map(e.ArtifactCollected, artifacts), exited, e.TaskFinished())
    pages.tasks.preserved |= {"task-001"} if is_preserved else set()
    text = pages.get("/tasks/task-001").text
    assert (f'data-removes="{removed}"' in text, "data-has-children" in text) == (True, False)


def test_confirmation_shows_whether_other_tasks_continue_the_task(pages):
    add_ended(pages.tasks)
    add_ended(pages.tasks, "task-002", parent=PARENT)
    assert "data-has-children" in pages.get("/tasks/task-001").text


def test_rerun_links_to_its_origin(pages):
    add_ended(pages.tasks)
    add_ended(pages.tasks, "again", rerun_of="task-001")
    assert '<a id="origin" href="/tasks/task-001" title="task-001">task-001</a>' in pages.get("/tasks/again").text
    assert 'id="origin"' not in pages.get("/tasks/task-001").text


def test_repository_name_links_to_its_tasks(pages):
    add_ended(pages.tasks)
    link = re.search(r'<a id="repository" href="([^"]*)"[^>]*>([^<]*)</a>', pages.get("/tasks/task-001").text)
    assert link.groups() == ("/?repository=https%3A%2F%2Fexample.org%2Fr.git", "example.org/r")


def test_links_to_continuations_show_their_states(pages):
    add_ended(pages.tasks)
    add_ended(pages.tasks, "first", parent=PARENT)
    pages.tasks._apply("second", e.TaskSubmitted("second", manifest("second"), None, PARENT, "first"))
    pages.tasks.record("second", *TO_RUNNING, e.AgentExited(1, None, FAILURE), e.TaskFinished())
    text = re.sub(r"<[^>]*>", "", re.search(r"<span>continued by.*?</span>", pages.get("/tasks/task-001").text)[0])
    assert text == "continued by first (completed), second (rerun, failed)"


def test_chain_has_totals_on_each_of_its_pages(pages):
    add_ended(pages.tasks, "task-001", e.Progress(cost_usd=0.25))
    add_ended(pages.tasks, "alone", e.Progress(cost_usd=0.25))
    add_ended(pages.tasks, "task-002", e.Progress(cost_usd=1.5), parent=PARENT)
    for task_id in ("task-001", "task-002"):
        totals = re.search(r'id="chain-totals".*?</div>', pages.get(f"/tasks/{task_id}").text, re.DOTALL)[0]
        assert ("Chain of 2 tasks" in totals, "$1.75" in totals) == (True, True)
    assert "chain-totals" not in pages.get("/tasks/alone").text


def test_title_starts_with_the_state(pages):
    add_ended(pages.tasks)
    pages.tasks.add("works", *TO_RUNNING)
    pages.tasks.add("waits")
    pages.tasks.add("failed", *TO_RUNNING, e.AgentExited(1, None, FAILURE), e.TaskFinished())
    texts = [pages.get(f"/tasks/{task_id}").text for task_id in ("task-001", "works", "waits", "failed")]
    assert [re.search("<title>(.*) .* [Tt]ask · Sandbox</title>", text)[1] for text in texts] == ["✓", "▶", "…", "✗"]


def test_changed_files_are_counted_on_the_page(pages):
    collected = e.ArtifactCollected(PATCH, diff=DiffStatistics(28, 212, 245))
    add_ended(pages.tasks, "task-001", collected)
    chain, patch = (
        msgspec.structs.replace(PATCH, name=name, path=f".sandbox/{name}")
        for name in ("again.chain.patch", "again.patch")
    )
    add_ended(pages.tasks, "again", e.ArtifactCollected(chain), e.ArtifactCollected(patch, diff=collected.diff))
    counts = [
        re.search('id="tally-changes">([^<]*)<', pages.get(f"/tasks/{id_}").text)[1] for id_ in ("task-001", "again")
    ]
    assert counts == ["28", ""]  # the view of a chain begins with the changes from all of its tasks
    texts = [pages.get(f"/tasks/{task_id}").text for task_id in ("task-001", "again")]
    sizes = [re.search(r"<dt>Changes of the chain</dt><dd[^>]* data-patch=\"([^\"]*)\"", text) for text in texts]
    assert [size and size[1] for size in sizes] == [None, "again.chain.patch"]
    downloads = [re.findall(r"download>(Download patch[^<]*)<", text) for text in texts]
    assert downloads == [["Download patch"], ["Download patch of this task", "Download patch of the chain"]]


def test_agent_activity_is_not_shown_while_artifacts_are_collected(pages):
    pages.tasks.add("works", *TO_RUNNING)
    pages.tasks.add("collects", *TO_RUNNING, e.AgentExited(0, None, None))
    works, collects = (pages.get(f"/tasks/{task_id}").text for task_id in ("works", "collects"))
    assert ('id="activity-now"' in works, 'id="activity-now"' in collects) == (True, False)
    assert ('id="activity-state"' in works, 'id="activity-state"' in collects) == (True, True)


@pytest.mark.parametrize(
    ("recorded", "row"),
    [("cluster:node-7", '<dt>Host</dt><dd class="mono">node-7</dd>'), ("node-7", None), ("", None)],
)
def test_host_in_a_cluster_is_shown(pages, recorded, row):
    """The server's own host is not shown."""
    pages.tasks.add("task-001", e.AttemptStarted("abcdefghijkl", "bubblewrap", recorded))
    text = pages.get("/tasks/task-001").text
    assert ("<dt>Host</dt>" in text) == (row is not None)
    assert row is None or row in text


GENERATED = ("21d64869-6bb9-4f0e-8f0e-0123456789ab", "21d6aaaa-6bb9-4f0e-8f0e-0123456789ab")


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("21d64869", GENERATED[0]),
        ("21d64869-6bb9-4f0e-8f0e-0123456789a", GENERATED[0]),
        ("21d6a", GENERATED[1]),
        ("21d6", None),
        ("21d", None),
        ("21d64869-6bb9-4f0e-8f0e-0123456789ac", None),
        ("fed", None),
        ("fedcba98", None),
        ("named", None),
    ],
)
def test_beginning_of_a_generated_id_leads_to_its_task(pages, path, found):
    """The id of a deleted task, such as `fed`, must not lead to another task."""
    for task_id in (*GENERATED, "fedcba98-2", "named-2"):
        pages.tasks.add(task_id)
    response = pages.get(f"/tasks/{path}")
    assert (response.status_code, response.headers.get("location")) == (
        (303, f"/tasks/{found}") if found else (404, None)
    )
    assert pages.get(f"/tasks/{path}", accept="application/json").status_code == 404
    assert pages.get(f"/tasks/{GENERATED[0]}").status_code == 200
