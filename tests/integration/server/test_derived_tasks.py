"""Tasks that start from earlier tasks: what they inherit, when a continuation is refused, and crashes."""

import dataclasses
import errno
import hashlib
import os
import shutil
import tarfile

import msgspec
import pytest

from doubles.manifests import manifest
from doubles.memory_store import MemoryStore
from doubles.server_components import TO_RUNNING, ServerComponents
from sandbox.bootstrap.data_dir_backup import create_backup
from sandbox.interfaces.server_services import (
    TaskNotContinuableError,
    TaskNotEndedError,
    TaskNotFoundError,
    UnavailableError,
)
from sandbox.interfaces.task_file_layout import TaskLayout
from sandbox.model import events as e
from sandbox.model import fixed_limits
from sandbox.model.artifacts import AGENT_SESSION_ARTIFACT, Artifact
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.resources import DiskSpace
from sandbox.server import derived_tasks, submissions
from sandbox.server.integrity import DiscrepancyKind, IntegrityCheck
from sandbox.server.maintenance import discard_unrecorded_tasks

PATCH = b"diff --git a/a b/a\n"
CONVERSATION = (e.AgentMessage("I did it."),)
OUTCOME = (e.AgentExited(0, {"is_error": False}),)


@pytest.fixture
def components(tmp_path):
    instance = ServerComponents(tmp_path, MemoryStore())
    yield instance
    for task_id in list(instance.placement.recorders):
        instance.placement.kill(task_id)


def store(components, task_id, name, content, **fields):
    directory = TaskLayout(components.data_dir, task_id).artifacts
    directory.mkdir(exist_ok=True)
    (directory / name).write_bytes(content)
    checksum = f"sha256:{hashlib.sha256(content).hexdigest()}"
    path = fields.pop("path", f".sandbox/{name}")
    return e.ArtifactCollected(Artifact(name, path, len(content), "text/plain", checksum, **fields))


async def run_to_end(components, service, task_id, *events):
    await components.wait_for_launch(task_id)
    if (await service.status(task_id)).attempt is None or not (await service.status(task_id)).agent_has_exited:
        components.placement.record(task_id, *TO_RUNNING, *CONVERSATION, *OUTCOME)
    components.placement.record(task_id, *events, e.TaskFinished())
    await service.wait(task_id, 10)


async def submit_ended(components, service, task_id="task-1", patch=PATCH, *, session=None, **fields):
    await service.submit(manifest(task_id))
    await components.wait_for_launch(task_id)
    events = [] if patch is None else [store(components, task_id, f"{task_id}.patch", patch, **fields)]
    if session is not None:
        events.append(store(components, task_id, AGENT_SESSION_ARTIFACT, session, is_internal=True))
    await run_to_end(components, service, task_id, *events)


async def submit_continuation(components, service, parent_id, task_id):
    continuation = await service.plan_continuation(parent_id)
    metadata = dataclasses.replace(continuation.manifest.metadata, id=task_id)
    agent = continuation.manifest.agent.with_prompt(f"Continue as {task_id}.")
    return await service.submit(
        continuation.manifest.replace(metadata=metadata, agent=agent), None, continuation.inheritance
    )


def inherited(components, task_id):
    directory = TaskLayout(components.data_dir, task_id).artifacts
    return {path.name: path.read_bytes() for path in directory.glob("inherited-*")}


async def test_chain_inherits_patches_conversation_and_session(components):
    async with components.server() as service:
        await submit_ended(components, service, session=b"session 1")
        await submit_continuation(components, service, "task-1", "task-2")
        assert inherited(components, "task-2") == {
            "inherited-1.patch": PATCH,
            "inherited-conversation.txt": b"User: Do it.\n\nAssistant: I did it.",
            "inherited-agent-session.gz": b"session 1",
        }
        second = await service.status("task-2")
        assert (second.parent.task_id, second.parent.chain_base_commit) == ("task-1", "c" * 40)
        assert (second.parent.session_id, second.manifest.repository.commit) == ("s", "c" * 40)
        await components.wait_for_launch("task-2")
        await run_to_end(components, service, "task-2", store(components, "task-2", "task-2.patch", b"diff --git 2\n"))
        await submit_continuation(components, service, "task-2", "task-3")
        third = await service.status("task-3")
        assert (third.parent.task_id, third.parent.session) == ("task-2", None)
        assert [patch.name for patch in third.parent.patches] == ["inherited-1.patch", "inherited-2.patch"]
        assert inherited(components, "task-3") == {
            "inherited-1.patch": PATCH,
            "inherited-2.patch": b"diff --git 2\n",
            "inherited-conversation.txt": b"User: Do it.\n\nAssistant: I did it.\n\n"
            b"User: Continue as task-2.\n\nAssistant: I did it.",
        }
        rerun = await service.plan_rerun("task-3")
        assert rerun.inheritance.parent == third.parent
        assert {name: path.read_bytes() for name, path in rerun.inheritance.sources.items()} == inherited(
            components, "task-3"
        )
        assert (await service.plan_rerun("task-1")).inheritance is None


async def test_chain_has_earlier_and_later_tasks(components, monkeypatch):
    async with components.server() as service:
        await submit_ended(components, service)
        await submit_ended(components, service, "other")
        for parent_id, task_id in (("task-1", "task-2"), ("task-2", "task-3"), ("task-2", "task-4")):
            await submit_continuation(components, service, parent_id, task_id)
            await components.wait_for_launch(task_id)
            await run_to_end(components, service, task_id, store(components, task_id, f"{task_id}.patch", b"diff 2\n"))

        async def chain(task_id):
            return [task.id for task in await service.chain(await service.status(task_id))]

        assert await chain("task-1") == await chain("task-2") == ["task-1", "task-2", "task-3", "task-4"]
        assert await chain("task-3") == ["task-1", "task-2", "task-3"]
        assert await chain("other") == ["other"]
        monkeypatch.setattr("sandbox.server.task_services.CHAIN_TOTALS_TASKS_MAX", 3)
        assert await chain("task-1") == ["task-1", "task-2", "task-3"]


async def test_only_the_given_task_of_a_chain_has_its_artifacts_and_report(components):
    """A chain may have 100 tasks, each with 10,000 artifacts, and many clients can request its status."""
    async with components.server() as service:
        await submit_ended(components, service)
        await submit_continuation(components, service, "task-1", "task-2")
        await components.wait_for_launch("task-2")
        await run_to_end(components, service, "task-2", store(components, "task-2", "task-2.patch", b"diff 2\n"))
        await submit_continuation(components, service, "task-2", "task-3")
        chain = await service.chain(await service.status("task-2"))
        assert [(task.id, bool(task.artifacts), bool(task.manifest.agent.prompt)) for task in chain] == [
            ("task-1", False, False),
            ("task-2", True, True),
            ("task-3", False, False),
        ]
        assert chain[0].progress == (await service.status("task-1")).progress


async def test_chain_ends_before_a_removed_task(components):
    async with components.server() as service:
        await submit_ended(components, service)
        await submit_continuation(components, service, "task-1", "task-2")
        second = await service.status("task-2")
        cycle = msgspec.structs.replace(second, parent=msgspec.structs.replace(second.parent, task_id="task-2"))
        removed = msgspec.structs.replace(second, parent=msgspec.structs.replace(second.parent, task_id="removed"))
        for task in (cycle, removed):
            assert await service.chain(task) == [task]


async def test_journal_has_the_parent_after_a_restart(components):
    async with components.server() as service:
        await submit_ended(components, service)
        await submit_continuation(components, service, "task-1", "task-2")
        expected = (await service.status("task-2")).parent
    assert components.journals.replay("task-2").task.parent == expected
    assert [file.name for file in components.journals.replay("task-2").task.stored_files][:1] == ["inherited-1.patch"]


@pytest.mark.parametrize("patch", [b"", b"# skipped, a socket: run.sock\n"])
async def test_task_without_changes_adds_no_patch(components, patch):
    async with components.server() as service:
        await submit_ended(components, service, patch=patch)
        continuation = await service.plan_continuation("task-1")
        assert continuation.inheritance.parent.patches == ()


@pytest.mark.parametrize(
    ("patch", "fields", "reason"),
    [
        (None, {}, "it ended without a patch"),
        (b"# truncated: it took too long\n", {}, "its patch is incomplete"),
        (b"# skipped, a socket: x\n# skipped, too large for a patch: big\n" + PATCH, {}, "its patch is incomplete"),
        (PATCH, {"contains_secret": True}, "its patch contains the value of a secret"),
        (PATCH, {"path": "task-1.patch"}, "it ended without a patch"),
    ],
)
async def test_unusable_patch_is_refused(components, patch, fields, reason):
    async with components.server() as service:
        await submit_ended(components, service, patch=patch, **fields)
        with pytest.raises(TaskNotContinuableError, match=f"Task task-1 cannot be continued: {reason}. .") as caught:
            await service.plan_continuation("task-1")
        assert await service.continuation_refusal(await service.status("task-1")) == caught.value.message


async def test_patch_with_a_line_that_resembles_a_truncation_remark_is_accepted(components):
    content = PATCH + b"+# truncated: this is a line of a file\n"
    async with components.server() as service:
        await submit_ended(components, service, patch=content)
        assert len((await service.plan_continuation("task-1")).inheritance.parent.patches) == 1
        assert await service.continuation_refusal(await service.status("task-1")) is None


async def test_task_that_never_cloned_its_repository_is_refused(components):
    async with components.server() as service:
        await service.submit(manifest("task-1"))
        await components.wait_for_launch("task-1")
        failure = Failure(FailureCode.CLONE_FAILED, "no such branch")
        components.placement.record("task-1", e.AttemptFailed(failure), e.TaskFinished())
        task = await service.wait("task-1", 10)
        assert (task.state, task.base_commit) == ("failed", None)
        with pytest.raises(TaskNotContinuableError) as caught:
            await service.plan_continuation("task-1")
        assert await service.continuation_refusal(task) == caught.value.message


async def test_task_whose_patch_lacks_changes_is_refused(components):
    async with components.server() as service:
        await service.submit(manifest())
        await components.wait_for_launch("task-1")
        names = ("task-1.patch", "task-1.changes.tar")
        await run_to_end(components, service, "task-1", *(store(components, "task-1", name, PATCH) for name in names))
        with pytest.raises(TaskNotContinuableError, match="incomplete"):
            await service.plan_continuation("task-1")


async def test_running_and_unknown_tasks_are_refused(components):
    async with components.server() as service:
        await components.start_running_task(service)
        with pytest.raises(TaskNotEndedError, match="is running; wait for it to end"):
            await service.plan_continuation("task-1")
        with pytest.raises(TaskNotFoundError):
            await service.plan_continuation("task-9")


async def test_chain_is_bounded(components, monkeypatch):
    monkeypatch.setattr("sandbox.server.derived_tasks.EARLIER_PATCHES_MAX", 1)
    async with components.server() as service:
        await submit_ended(components, service)
        await submit_continuation(components, service, "task-1", "task-2")
        await components.wait_for_launch("task-2")
        await run_to_end(components, service, "task-2", store(components, "task-2", "task-2.patch", PATCH))
        with pytest.raises(TaskNotContinuableError, match="exceeds the limit"):
            await service.plan_continuation("task-2")
    assert fixed_limits.EARLIER_PATCHES_MAX > 1


@pytest.mark.parametrize("damage", ["changed", "removed"])
async def test_nothing_is_submitted_if_the_parent_changes_before_the_copy(components, damage):
    async with components.server() as service:
        await submit_ended(components, service)
        continuation = await service.plan_continuation("task-1")
        file = TaskLayout(components.data_dir, "task-1").artifacts / "task-1.patch"
        file.unlink() if damage == "removed" else file.write_bytes(PATCH + b"x")
        with pytest.raises(UnavailableError):
            await service.submit(manifest("task-2"), None, continuation.inheritance)
        assert not TaskLayout(components.data_dir, "task-2").root.exists()
        with pytest.raises(TaskNotFoundError):
            await service.status("task-2")


@pytest.mark.parametrize("kind", ["continuation", "rerun"])
async def test_submission_reports_that_the_earlier_task_was_deleted_in_the_meantime(components, kind):
    """The deletion removes the task's files after the new task was planned."""
    async with components.server() as service:
        await submit_ended(components, service)
        source, rerun_of = "task-1", None
        if kind == "rerun":
            await submit_continuation(components, service, "task-1", "task-2")
            await run_to_end(components, service, "task-2")
            source = rerun_of = "task-2"
        plan = await (service.plan_rerun if rerun_of else service.plan_continuation)(source)
        await service.delete(source)
        with pytest.raises(TaskNotFoundError, match=source):
            await service.submit(manifest("task-3"), None, plan.inheritance, rerun_of)
        assert not TaskLayout(components.data_dir, "task-3").root.exists()


@pytest.mark.parametrize("moment", ["before its files are read", "while its events are read"])
async def test_plan_reports_that_the_earlier_task_was_deleted_in_the_meantime(components, monkeypatch, moment):
    """Without the events, the new task would get an incomplete conversation."""
    async with components.server() as service:
        await submit_ended(components, service)
        await submit_ended(components, service, "task-2", patch=None)
        owner, name = (
            (derived_tasks, "_inherit_files")
            if moment == "before its files are read"
            else (derived_tasks.ConversationText, "add_event")
        )
        original, deleted = getattr(owner, name), []

        def delete_first(*arguments):
            if not deleted:
                deleted.append(components.store.delete("task-1"))
                shutil.rmtree(TaskLayout(components.data_dir, "task-1").root)
            return original(*arguments)

        monkeypatch.setattr(owner, name, delete_first)
        with pytest.raises(TaskNotFoundError, match="task-1"):
            await service.plan_continuation("task-1")
        assert deleted
        with pytest.raises(TaskNotContinuableError, match="without a patch"):
            await service.plan_continuation("task-2")


async def test_files_of_a_task_that_was_not_recorded_are_removed_at_the_next_start(components, monkeypatch):
    """The server is killed after it has copied the files, but before it writes the first record."""
    async with components.server() as service:
        await submit_ended(components, service)
        await submit_continuation(components, service, "task-1", "task-3")
        continuation = await service.plan_continuation("task-1")

        def die(layout, inheritance):
            derived_tasks.store_inheritance(layout, inheritance)
            raise KeyboardInterrupt

        store = submissions.SubmissionStore(
            components.data_dir, components.journals, components.store, components.clock
        )
        with monkeypatch.context() as patch:
            patch.setattr(submissions, "store_inheritance", die)
            patch.setattr(submissions, "discard_inheritance", lambda _: None)
            patch.setattr(components.journals, "discard", lambda _, writer: writer.close())
            with pytest.raises(KeyboardInterrupt):
                store.add(manifest("task-2"), None, continuation.inheritance)
    assert inherited(components, "task-2")
    lost = TaskLayout(components.data_dir, "lost").artifacts
    lost.mkdir(parents=True)
    before = inherited(components, "task-3")
    discard_unrecorded_tasks(components.data_dir, components.journals, components.store)
    assert not TaskLayout(components.data_dir, "task-2").root.exists()
    assert (TaskLayout(components.data_dir, "task-1").artifacts / "task-1.patch").exists()
    assert inherited(components, "task-3") == before
    assert lost.exists(), "a task whose journal is missing may be restored from a backup"


@pytest.mark.parametrize("leftovers", [None, (), ("lock",), ("lock", "records")])
async def test_directories_of_a_task_that_was_not_recorded_are_removed_at_the_next_start(components, leftovers):
    """The server is killed while it creates a journal."""
    async with components.server() as service:
        await submit_ended(components, service)
    begun, damaged = (TaskLayout(components.data_dir, name).root / "journal" for name in ("begun", "damaged"))
    for directory in (begun.parent if leftovers is None else begun, damaged):
        directory.mkdir(parents=True)
    for name in leftovers or ():
        (begun / name).touch()
    (damaged / "records").write_bytes(b"damaged\n" * 9)
    discard_unrecorded_tasks(components.data_dir, components.journals, components.store)
    assert not begun.parent.exists()
    assert (damaged / "records").exists()
    async with components.server() as service:
        assert (await service.status("task-1")).state.is_final


async def test_results_of_a_task_whose_journal_consists_of_zeros_are_kept(components, caplog):
    """A backup contains zeros in place of a file that could not be read. It contains no index."""
    async with components.server() as service:
        await submit_ended(components, service)
        await submit_continuation(components, service, "task-1", "task-2")
        await components.wait_for_launch("task-2")
        await run_to_end(components, service, "task-2", store(components, "task-2", "task-2.patch", b"diff --git 2\n"))
    layout = TaskLayout(components.data_dir, "task-2")
    (layout.root / "journal" / "records").write_bytes(bytes(4096))
    components.store.delete("task-2")
    discard_unrecorded_tasks(components.data_dir, components.journals, components.store)
    assert (layout.artifacts / "task-2.patch").read_bytes() == b"diff --git 2\n"
    assert (layout.artifacts / "inherited-1.patch").exists()
    assert "Task task-2 has results, but its journal has no record" in caplog.text
    checked = IntegrityCheck(
        components.journals, components.store, components.data_dir, deep=False, wait_for_indexing=lambda: None
    )
    assert [(each.task_id, each.kind) for each in checked.find_discrepancies()] == [
        ("task-2", DiscrepancyKind.JOURNAL_DAMAGED)
    ]


async def test_files_of_a_task_are_kept_if_they_cannot_be_listed_at_the_start(components, caplog):
    layout = TaskLayout(components.data_dir, "unreadable")
    (layout.root / "journal").mkdir(parents=True)
    (layout.root / "journal" / "records").touch()
    layout.artifacts.symlink_to(layout.artifacts)
    discard_unrecorded_tasks(components.data_dir, components.journals, components.store)
    assert layout.artifacts.is_symlink()
    assert "Task unreadable has no record, and its files cannot be listed" in caplog.text
    async with components.server() as service:
        await submit_ended(components, service)


async def test_inherited_files_are_backed_up_and_checked_like_artifacts(components, tmp_path):
    async with components.server() as service:
        await submit_ended(components, service, session=b"session 1")
        await submit_continuation(components, service, "task-1", "task-2")
        create_backup(components.data_dir, tmp_path / "backup.tar")
        with tarfile.open(tmp_path / "backup.tar") as tar:
            names = {name.removeprefix("tasks/task-2/artifacts/") for name in tar.getnames() if "task-2/artif" in name}
        assert names == inherited(components, "task-2").keys()
        assert find_damaged(components) == []
        inherited_patch = TaskLayout(components.data_dir, "task-2").artifacts / "inherited-1.patch"
        inherited_patch.unlink()
        inherited_patch.write_bytes(b"x" * len(PATCH))
        assert find_damaged(components) == ["task-2"]


async def test_inherited_files_need_no_disk_space_and_outlive_the_parent(components):
    async with components.server() as service:
        await submit_ended(components, service, session=b"session 1")
        await submit_continuation(components, service, "task-1", "task-2")
        parent, derived = (TaskLayout(components.data_dir, name).artifacts for name in ("task-1", "task-2"))
        before = inherited(components, "task-2")
        assert (derived / "inherited-1.patch").samefile(parent / "task-1.patch")
        shutil.rmtree(parent)
        assert inherited(components, "task-2") == before


@pytest.mark.parametrize("number", [errno.EMLINK, errno.EPERM])
async def test_inherited_files_that_cannot_be_linked_are_copied(components, monkeypatch, number):
    """A file can have at most 65,000 links on ext4, and some file systems do not support links."""

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    async with components.server() as service:
        await submit_ended(components, service, session=b"session 1")
        monkeypatch.setattr(derived_tasks.os, "link", refuse)
        await submit_continuation(components, service, "task-1", "task-2")
        parent, derived = (TaskLayout(components.data_dir, name).artifacts for name in ("task-1", "task-2"))
        assert not (derived / "inherited-1.patch").samefile(parent / "task-1.patch")
        assert (derived / "inherited-1.patch").read_bytes() == PATCH
        assert find_damaged(components) == []


async def test_continuation_is_refused_after_any_other_link_error(components, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async with components.server() as service:
        await submit_ended(components, service)
        monkeypatch.setattr(derived_tasks.os, "link", refuse)
        with pytest.raises(UnavailableError, match="could not be stored"):
            await submit_continuation(components, service, "task-1", "task-2")


async def test_continuation_is_refused_while_the_disk_is_nearly_full(components):
    async with components.server() as service:
        await submit_ended(components, service)
        components.space = DiskSpace(0, 1000 * 1024**3)
        with pytest.raises(UnavailableError, match="free"):
            await submit_continuation(components, service, "task-1", "task-2")
        assert not inherited(components, "task-2")


def find_damaged(components):
    journals, store = components.journals, components.store
    check = IntegrityCheck(journals, store, components.data_dir, deep=True, wait_for_indexing=lambda: None)
    kinds = (DiscrepancyKind.ARTIFACT_DAMAGED, DiscrepancyKind.ARTIFACT_MISSING)
    return [found.task_id for found in check.find_discrepancies() if found.kind in kinds]
