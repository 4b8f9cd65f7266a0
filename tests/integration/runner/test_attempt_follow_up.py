"""An attempt that another one follows: nothing of it is left but what is handed on, and then it says so."""

import asyncio
import errno

import msgspec
import pytest

from doubles.attempt_dependencies import ATTEMPT_ID, BASE, BOOT_ID, Script
from sandbox.disks import removal
from sandbox.disks.directory import DirectoryDisks
from sandbox.interfaces.placement import CancelOrder
from sandbox.interfaces.runtime import ExitStatus
from sandbox.interfaces.secrets import make_fingerprint
from sandbox.model.errors import AttemptError, Failure, FailureCode
from sandbox.model.events import (
    AgentStarted,
    AttemptEnded,
    AttemptFailed,
    AttemptStarted,
    CancelRequested,
    Progress,
    RetrySkipped,
    SandboxCreated,
    Usage,
    WorkspacePrepared,
)
from sandbox.model.task_state import TaskState
from sandbox.runner.attempt import AttemptRunner
from sandbox.runner.steps.provision import write_handle
from sandbox.secrets.redactor import SecretRedactor

TO_RUNNING = (WorkspacePrepared(BASE), SandboxCreated("v", "scripted", "host"), AgentStarted("session"))
SECOND_ID = "bcdefghijklm"


def left(scene, attempt_id=ATTEMPT_ID):
    root = scene.attempt.task_files.attempt(attempt_id).root
    return {path.name for path in root.iterdir()} - {"runner.log"}


def killed(scene, *facts):
    """What a runner leaves that was killed after these facts."""
    for fact in facts:
        scene.recorder.record(fact)
    for directory in (scene.attempt.files.workspace, scene.attempt.files.home, scene.attempt.files.repository):
        directory.mkdir(parents=True, exist_ok=True)
    (scene.attempt.files.workspace / "edited.txt").write_text("half done\n")
    write_handle(scene.attempt.files.handle, scene.attempt.dependencies.runtime.prepare(ATTEMPT_ID))


def second(scene, *, resumes, **parts):
    """The attempt after it, as the server would begin it."""
    scene.recorder.record(AttemptStarted(SECOND_ID, "scripted", "here", BOOT_ID, number=2, resumes=resumes))
    attempt = msgspec.structs.replace(scene.attempt, id=SECOND_ID, **parts)
    attempt.files.root.mkdir()
    return AttemptRunner(attempt)


def test_a_failed_agent_with_a_retry_left_is_cleared_away_and_nothing_collected(stage):
    scene = stage(Script(exit=ExitStatus(1)), lifecycle={"retries": 1})
    asyncio.run(scene.life.run())
    assert (scene.task.state, scene.task.attempt.follow_up) == (TaskState.RUNNING, "retry")
    assert scene.task.attempt.failure.code == "agent_failed"
    assert isinstance(scene.events(object)[-1], AttemptEnded)
    assert scene.script.seen[-1] == "destroy"
    assert (left(scene), scene.artifacts) == (set(), set())


def test_what_is_told_of_a_task_that_is_cancelled_before_its_next_attempt_is_no_secret(stage):
    """There is no disk any more on which anything could stand that nobody finds."""
    scene = stage(
        Script(exit=ExitStatus(1)),
        secrets={"TOKEN": "a value of hers"},
        manifest_secrets=("TOKEN",),
        lifecycle={"retries": 1},
    )
    asyncio.run(scene.life.run())
    scene.recorder.record(CancelRequested())
    asyncio.run(AttemptRunner(scene.attempt).finish())
    assert scene.task.state is TaskState.CANCELLED
    flags = {artifact.name: artifact.contains_secret for artifact in scene.task.artifacts}
    assert flags == {"transcript.ndjson": False, "metadata.json": False}


def test_the_next_attempt_begins_with_a_fresh_workspace_and_its_end_is_the_tasks(stage):
    scene = stage(Script(exit=ExitStatus(1)), lifecycle={"retries": 1})
    asyncio.run(scene.life.run())
    scene.script.exit = ExitStatus(0)
    asyncio.run(second(scene, resumes=False).run())
    assert scene.task.state is TaskState.COMPLETED
    assert scene.states == ["pending", "staging", "provisioning", "ready", "running", "completing", "completed"]
    assert {"task-1.patch", "metadata.json"} <= scene.artifacts
    assert [attempt.failure.code for attempt in scene.task.past_attempts] == ["agent_failed"]


def test_of_rendered_output_only_the_last_attempts_is_shown(stage):
    scene = stage(Script(exit=ExitStatus(1)), lifecycle={"retries": 1}, claude={"output_format": "json"})
    asyncio.run(scene.life.run())
    assert scene.outputs("stdout") == []
    scene.script.exit = ExitStatus(0)
    asyncio.run(second(scene, resumes=False).run())
    assert scene.outputs("stdout") == [b"rendered\n"]


def test_rendered_output_is_shown_when_the_next_attempt_is_forgone(stage):
    script = Script(exit=ExitStatus(1), destroy_error=AttemptError(FailureCode.SANDBOX_LOST, "It does not end."))
    scene = stage(script, lifecycle={"retries": 1}, claude={"output_format": "json"})
    asyncio.run(scene.life.run())
    assert scene.task.state is TaskState.FAILED
    assert scene.outputs("stdout") == [b"rendered\n"]


def test_rendered_output_is_shown_when_the_task_is_cancelled_before_the_next_attempt(stage):
    scene = stage(Script(exit=ExitStatus(1)), lifecycle={"retries": 1}, claude={"output_format": "text"})
    asyncio.run(scene.life.run())
    assert scene.outputs("stdout") == []
    scene.recorder.record(CancelRequested("enough"))
    asyncio.run(AttemptRunner(scene.attempt).finish())
    assert scene.task.state is TaskState.CANCELLED
    assert scene.outputs("stdout") == [b"rendered\n"]


def test_no_attempt_follows_while_something_of_the_sandbox_will_not_go(stage):
    script = Script(exit=ExitStatus(1), destroy_error=AttemptError(FailureCode.SANDBOX_LOST, "It does not end."))
    scene = stage(script, lifecycle={"retries": 5})
    asyncio.run(scene.life.run())
    [forgone] = scene.events(RetrySkipped)
    assert (forgone.follow_up, forgone.reason) == ("retry", "It does not end.")
    assert (scene.task.state, scene.task.failure.code) == (TaskState.FAILED, "agent_failed")
    assert scene.events(AttemptEnded) == []
    assert "task-1.patch" in scene.artifacts


def test_of_a_workspace_that_is_half_removed_no_patch_is_made(stage):
    """It would say that the agent had removed the files."""
    scene = stage(Script(exit=ExitStatus(1)), lifecycle={"retries": 1})

    async def break_off(paths):
        if paths:
            raise OSError("some files would not go")

    equipment = msgspec.structs.replace(scene.attempt.dependencies, remove=break_off)
    asyncio.run(AttemptRunner(msgspec.structs.replace(scene.attempt, dependencies=equipment)).run())
    assert len(scene.events(RetrySkipped)) == 1
    assert scene.task.failure.code == "agent_failed"
    assert "metadata.json" in scene.artifacts
    assert "task-1.patch" not in scene.artifacts


@pytest.mark.parametrize("come_to", range(3))
def test_a_finisher_makes_way_for_what_had_not_begun(stage, come_to):
    scene = stage(Script())
    killed(scene, *TO_RUNNING[:come_to])
    asyncio.run(scene.life.finish())
    assert (scene.task.attempt.follow_up, scene.task.attempt.failure.code) == ("again", "runner_lost")
    assert scene.script.seen[0] == "destroy"
    assert left(scene) == set()


def test_a_finisher_lets_an_agent_that_had_begun_be(stage):
    scene = stage(Script())
    killed(scene, *TO_RUNNING)
    asyncio.run(scene.life.finish())
    assert (scene.task.state, scene.task.failure.code) == (TaskState.FAILED, "runner_lost")


def test_a_finisher_that_was_killed_in_the_middle_is_followed_by_one_that_ends_its_work(stage):
    """The failure is written, the workspace half removed."""
    scene = stage(Script())
    killed(scene, AttemptFailed(Failure(FailureCode.RUNNER_LOST, "gone")))
    (scene.attempt.files.workspace / "edited.txt").unlink()
    asyncio.run(scene.life.finish())
    assert scene.task.attempt.follow_up == "again"
    assert len(scene.events(AttemptFailed)) == 1


def test_a_lost_agent_with_resume_hands_its_disk_and_its_session_on(stage):
    scene = stage(Script(), lifecycle={"resume": True})
    killed(scene, *TO_RUNNING)
    asyncio.run(scene.life.finish())
    assert scene.task.attempt.follow_up == "resume"
    assert left(scene) == {"disk", "repository.git"}
    asyncio.run(second(scene, resumes=True).run())
    assert scene.task.state is TaskState.COMPLETED
    assert "resume" in scene.script.seen
    assert [event.session_id for event in scene.events(AgentStarted)] == ["session", "session"]
    assert [event.base_commit for event in scene.events(WorkspacePrepared)] == [BASE, BASE]
    assert "task-1.patch" in scene.artifacts
    assert (left(scene), left(scene, SECOND_ID)) == (set(), set())


@pytest.mark.parametrize("secrets", [{"TOKEN": "rotated since"}, {"TOKEN": "first of all", "MORE": "another one"}])
def test_an_agent_whose_secrets_are_others_by_now_does_not_go_on_with_the_old_ones_on_its_disk(stage, secrets):
    given = {"TOKEN": "first of all"}
    scene = stage(Script(), secrets=given, manifest_secrets=("TOKEN",), lifecycle={"resume": True})
    killed(scene, *TO_RUNNING)
    scene.attempt.files.secret_fingerprint.write_bytes(make_fingerprint(scene.attempt.secrets))
    asyncio.run(scene.life.finish())
    assert scene.task.attempt.follow_up == "resume"  # the values changed after that
    asyncio.run(second(scene, resumes=True, secrets=secrets, redaction=SecretRedactor(secrets)).run())
    assert (scene.task.state, scene.task.failure.code) == (TaskState.FAILED, "secret_unavailable")
    assert "start" not in scene.script.seen
    unflagged = {artifact.name for artifact in scene.task.artifacts if not artifact.contains_secret}
    assert unflagged == {"transcript.ndjson", "metadata.json"} < scene.artifacts
    assert (left(scene), left(scene, SECOND_ID)) == (set(), set())


@pytest.mark.parametrize(("retries", "follow_up"), [(1, "retry"), (0, None)])
def test_who_cannot_be_resumed_with_other_secrets_begins_anew_where_that_is_asked_for(stage, retries, follow_up):
    rotated = {"TOKEN": "rotated since"}
    scene = stage(Script(), secrets={"TOKEN": "first of all"}, lifecycle={"resume": True, "retries": retries})
    killed(scene, *TO_RUNNING)
    scene.attempt.files.secret_fingerprint.write_bytes(make_fingerprint(scene.attempt.secrets))
    attempt = msgspec.structs.replace(scene.attempt, secrets=rotated, redaction=SecretRedactor(rotated))
    asyncio.run(AttemptRunner(attempt).finish())
    assert scene.task.attempt.follow_up == follow_up
    assert [event.follow_up for event in scene.events(RetrySkipped)] == ["resume"]


def test_an_agent_whose_secrets_are_the_same_goes_on(stage):
    scene = stage(Script(), secrets={"TOKEN": "first of all"}, lifecycle={"resume": True})
    killed(scene, *TO_RUNNING)
    scene.attempt.files.secret_fingerprint.write_bytes(make_fingerprint(scene.attempt.secrets))
    asyncio.run(scene.life.finish())
    asyncio.run(second(scene, resumes=True).run())
    assert scene.task.state is TaskState.COMPLETED
    assert "resume" in scene.script.seen


def test_requests_that_a_dead_runner_had_not_counted_are_and_no_tool_runs_any_more(stage):
    scene = stage(Script())
    killed(scene, *TO_RUNNING, Progress(turns=2, current_tool="Bash"), Usage("m", 100, 20, 0, 0, 0.25))
    asyncio.run(scene.life.finish())
    progress = scene.task.progress
    assert (progress.turns, progress.current_tool) == (2, None)
    assert (progress.input_tokens, progress.output_tokens, progress.cost_usd) == (100, 20, 0.25)


def test_what_a_dead_runner_had_half_taken_over_is_taken_over_whole(stage):
    scene = stage(Script(), lifecycle={"resume": True})
    killed(scene, *TO_RUNNING)
    asyncio.run(scene.life.finish())
    life = second(scene, resumes=True)
    files = scene.attempt.task_files
    files.attempt(ATTEMPT_ID).disk.rename(files.attempt(SECOND_ID).disk)
    asyncio.run(life.finish())
    assert scene.task.attempt.follow_up == "again"
    assert left(scene, SECOND_ID) == {"disk", "repository.git"}
    assert (files.attempt(SECOND_ID).workspace / "edited.txt").read_text() == "half done\n"


def test_a_wish_to_cancel_before_the_resumed_agent_goes_on_keeps_what_was_there(stage):
    scene = stage(Script(), lifecycle={"resume": True})
    killed(scene, *TO_RUNNING)
    asyncio.run(scene.life.finish())
    life = second(scene, resumes=True)
    assert life.cancel(CancelOrder("enough")).done
    asyncio.run(life.finish())
    assert scene.task.state is TaskState.CANCELLED
    assert {"task-1.patch", "metadata.json"} <= scene.artifacts


def test_a_wish_to_cancel_while_the_disk_is_taken_over_keeps_what_was_there(stage):
    scene = stage(Script(), lifecycle={"resume": True})
    killed(scene, *TO_RUNNING)
    asyncio.run(scene.life.finish())
    life = second(scene, resumes=True)
    assert life.cancel(CancelOrder("enough")).done
    asyncio.run(life.run())
    assert scene.task.state is TaskState.CANCELLED
    assert {"task-1.patch", "metadata.json"} <= scene.artifacts


def test_a_lost_agent_whose_time_is_over_before_it_can_go_on_loses_no_work(stage):
    """As after a machine that was down for longer than `lifecycle.timeout`."""
    scene = stage(Script(), lifecycle={"resume": True, "timeout": "1s"})
    killed(scene, *TO_RUNNING[:-1], AgentStarted("session", scene.attempt.dependencies.clock.monotonic() - 3600))
    asyncio.run(scene.life.finish())
    assert scene.task.attempt.follow_up == "resume"
    asyncio.run(second(scene, resumes=True).run())
    assert (scene.task.state, scene.task.failure.code) == (TaskState.FAILED, "timeout")
    assert "task-1.patch" in scene.artifacts
    assert (left(scene), left(scene, SECOND_ID)) == (set(), set())


def test_the_files_of_an_agent_that_could_not_go_on_are_kept_where_that_is_asked_for(stage):
    scene = stage(Script(), lifecycle={"resume": True, "timeout": "1s", "failure_action": "preserve"})
    killed(scene, *TO_RUNNING[:-1], AgentStarted("session", scene.attempt.dependencies.clock.monotonic() - 3600))
    asyncio.run(scene.life.finish())
    asyncio.run(second(scene, resumes=True).run())
    assert scene.task.state is TaskState.FAILED_PRESERVED
    kept = scene.attempt.task_files.attempt(SECOND_ID).workspace / "edited.txt"
    assert kept.read_text() == "half done\n"


def test_nothing_is_called_preserved_that_made_way_for_a_retry(stage):
    scene = stage(Script(exit=ExitStatus(1)), lifecycle={"retries": 1, "failure_action": "preserve"})
    asyncio.run(scene.life.run())
    scene.recorder.record(AttemptFailed(Failure(FailureCode.SECRET_UNAVAILABLE, "gone")))
    asyncio.run(AttemptRunner(scene.attempt).finish())
    assert left(scene) == set()
    assert (scene.task.state, scene.task.failure.code) == (TaskState.FAILED, "secret_unavailable")


@pytest.mark.parametrize(("retries", "follow_up"), [(0, None), (1, "retry")])
def test_a_session_that_was_not_kept_is_not_resumed(stage, retries, follow_up):
    scene = stage(Script(has_session=False), lifecycle={"resume": True, "retries": retries})
    killed(scene, *TO_RUNNING)
    asyncio.run(scene.life.finish())
    [forgone] = scene.events(RetrySkipped)
    assert forgone.follow_up == "resume"
    assert scene.task.attempt.follow_up == follow_up
    assert scene.task.state is (TaskState.RUNNING if retries else TaskState.FAILED)


def test_a_task_whose_time_is_over_begins_no_other_agent(stage):
    scene = stage(Script(exit=ExitStatus(1)), lifecycle={"retries": 1, "timeout": "1s"})
    asyncio.run(scene.life.run())
    life = second(scene, resumes=False)

    async def later():
        async with asyncio.timeout(20):
            while scene.attempt.dependencies.clock.monotonic() - scene.task.beginning.monotonic_seconds < 1:
                await asyncio.sleep(0.05)
        scene.script.seen.clear()
        await life.run()

    asyncio.run(later())
    assert (scene.task.state, scene.task.failure.code) == (TaskState.FAILED, "timeout")
    assert "start" not in scene.script.seen


def test_an_agent_is_on_record_before_anybody_serves_its_gateway(stage):
    scene = stage(Script())
    served = []

    async def serve(listeners):
        served.append(bool(scene.events(AgentStarted)))
        await asyncio.Event().wait()

    scene.attempt.dependencies.gateways.serve = serve
    scene.script.stays = True

    async def story():
        life = asyncio.create_task(scene.life.run())
        async with asyncio.timeout(20):
            while not served:
                await asyncio.sleep(0.01)
        scene.life.cancel(CancelOrder(force=True))
        await life

    asyncio.run(story())
    assert served == [True]


def test_a_model_at_an_address_that_is_none_is_told_in_its_own_words(stage):
    scene = stage(Script())

    def refuse(*_, **__):
        raise ValueError("ANTHROPIC_BASE_URL has no host.")

    scene.attempt.dependencies.gateways.create = refuse
    asyncio.run(scene.life.run())
    told = (scene.task.state, scene.task.failure.code, scene.task.failure.message)
    assert told == (TaskState.FAILED, "provision_failed", "ANTHROPIC_BASE_URL has no host.")


@pytest.mark.parametrize(("retries", "follow_up"), [(0, None), (1, "retry")])
def test_a_gateway_whose_work_breaks_in_a_living_runner_loses_the_sandbox(stage, retries, follow_up):
    scene = stage(Script(stays=True), lifecycle={"retries": retries})

    async def serve(listeners):
        raise OSError("a listener is gone")

    scene.attempt.dependencies.gateways.serve = serve
    asyncio.run(scene.life.run())
    failure = scene.task.failure or scene.task.attempt.failure
    assert failure.code == "sandbox_lost"
    assert "gateway broke" in failure.message
    assert scene.task.attempt.follow_up == follow_up


@pytest.mark.parametrize(("retries", "follow_up"), [(0, None), (1, "retry")])
def test_no_agent_goes_on_with_a_disk_that_lost_something(stage, monkeypatch, retries, follow_up):
    """Its twin hands the disk on above. Something is lost until the sandbox with what writes there is gone."""
    scene = stage(Script(), lifecycle={"resume": True, "retries": retries})
    killed(scene, *TO_RUNNING)

    async def verify(self, files):
        assert scene.script.seen[-1] == "destroy"
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(DirectoryDisks, "verify", verify)
    asyncio.run(scene.life.finish())
    [forgone] = scene.events(RetrySkipped)
    assert forgone.follow_up == "resume"
    assert "could not store all that the agent wrote (Input/output error)" in forgone.reason
    assert scene.task.attempt.follow_up == follow_up
    if not retries:
        assert scene.events(AttemptFailed)[-1].failure.code == "disk_full"
        assert scene.task.state is TaskState.FAILED
        assert "task-1.patch" in scene.artifacts


class MountedDisks(DirectoryDisks):
    """What is on them is seen only from `open` to `close`, as with a file system in a file."""

    async def open(self, files, size_bytes):
        if (files.root / "disk.img").exists():
            files.disk.rmdir()
            (files.root / "disk.img").rename(files.disk)
        await super().open(files, size_bytes)

    async def verify(self, files):
        """What collecting begins with, and the handing on."""
        assert (files.workspace / "edited.txt").exists()

    async def close(self, files):
        if any(files.disk.iterdir()):
            files.disk.rename(files.root / "disk.img")
            files.disk.mkdir()


def test_a_wish_to_cancel_while_the_disk_is_let_go_for_the_next_attempt_keeps_what_was_there(stage):
    scene = stage(Script(), lifecycle={"resume": True})
    killed(scene, *TO_RUNNING)

    async def remove(paths):
        if scene.task.cancel is None:
            scene.recorder.record(CancelRequested("enough"))
        await removal.remove_trees(paths)

    equipment = msgspec.structs.replace(scene.attempt.dependencies, remove=remove, disks=MountedDisks())
    asyncio.run(AttemptRunner(msgspec.structs.replace(scene.attempt, dependencies=equipment)).finish())
    assert scene.task.state is TaskState.CANCELLED
    assert {"task-1.patch", "metadata.json"} <= scene.artifacts
    assert left(scene) <= {"disk", "disk.img"}
