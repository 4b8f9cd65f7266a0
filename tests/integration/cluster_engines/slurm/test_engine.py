"""The engine with commands that fail, hang, or print arbitrary output."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from doubles.engine_harnesses import wait_until
from sandbox.cluster_engines.slurm import engine as slurm_engine
from sandbox.cluster_engines.slurm.commands import SlurmSettings
from sandbox.cluster_engines.slurm.engine import SlurmEngine
from sandbox.interfaces.cluster_engine import (
    EngineRejectedError,
    EngineUnavailableError,
    JobPhase,
    JobRequest,
    job_name,
)
from sandbox.interfaces.task_file_layout import new_attempt_id
from sandbox.model.resources import Resources

NAME = "sandbox-abcdefghij23"
REQUEST = JobRequest(NAME, ("/opt/worker", "x"), {"TOKEN": "secret"}, Resources(1, 1, 1), 60)
RECORD_CALL_SCRIPT = (
    'printf "%s\\0" "$0" "$@" >>"{calls}"; printf "\\n" >>"{calls}"; env >"{calls}.env"; cat >"{calls}.stdin"\n'
)


class FakeSlurm:
    """A directory of scripts that replace Slurm's commands. calls: the arguments of each command that was run."""

    def __init__(self, directory):
        self.directory = directory
        self._calls = directory / "calls"
        for name in ("sbatch", "squeue", "scancel", "sinfo"):
            self.define(name, "")

    def define(self, name, script):
        path = self.directory / name
        path.write_text(f"#!/bin/sh\n{RECORD_CALL_SCRIPT.format(calls=self._calls)}{script}\n")
        path.chmod(0o755)

    @property
    def calls(self):
        lines = self._calls.read_text().splitlines() if self._calls.exists() else []
        calls = [line.split("\0")[:-1] for line in lines]
        return [[os.path.basename(call[0]), *call[1:]] for call in calls]  # noqa: PTH119

    @property
    def environment(self):
        return (self.directory / "calls.env").read_text()

    @property
    def stdin(self):
        return (self.directory / "calls.stdin").read_text()


@pytest.fixture
def slurm(tmp_path):
    return FakeSlurm(tmp_path)


@pytest.fixture
def engine(slurm):
    return SlurmEngine(SlurmSettings(commands_dir=str(slurm.directory), configuration_path="/etc/slurm/other.conf"))


async def test_name_of_a_job_is_looked_up_before_its_submission(engine, slurm):
    await engine.submit(REQUEST)
    assert [call[0] for call in slurm.calls] == ["squeue", "sbatch"]
    assert {"--me", "--states=all", f"--name={NAME}"} <= set(slurm.calls[0])
    assert slurm.stdin == "#!/bin/sh\nexec /opt/worker x\n"


async def test_commands_have_a_clean_environment(engine, slurm, monkeypatch):
    monkeypatch.setenv("SBATCH_PARTITION", "wrong")
    monkeypatch.setenv("ANOTHER_SECRET", "x")
    await engine.submit(REQUEST)
    assert "TOKEN=secret" in slurm.environment
    assert "SLURM_CONF=/etc/slurm/other.conf" in slurm.environment
    await engine.reconcile_jobs([NAME])
    for unwanted in ("TOKEN", "SBATCH", "ANOTHER_SECRET", "HOME"):
        assert unwanted not in slurm.environment


async def test_job_that_slurm_lists_is_not_submitted_again(engine, slurm):
    slurm.define("squeue", f"echo '5|COMPLETED|n1|0:0|0|{NAME}|None|'")
    await engine.submit(REQUEST)
    assert [call[0] for call in slurm.calls] == ["squeue"]


async def test_concurrent_submissions_with_one_name_call_sbatch_once(engine, slurm, tmp_path):
    mark = tmp_path / "submitted"
    slurm.define("squeue", f"[ ! -e {mark} ] || echo '5|PENDING|n/a|0:0|0|{NAME}|None|'")
    slurm.define("sbatch", f"sleep 0.2; touch {mark}")
    await asyncio.gather(*(engine.submit(REQUEST) for _ in range(5)))
    assert [call[0] for call in slurm.calls].count("sbatch") == 1


@pytest.mark.parametrize(
    "message",
    [
        "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
        "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
        "sbatch: error: Slurm job queue full, sleeping and retrying.",
        "sbatch: error: AssocMaxSubmitJobLimit\nsbatch: error: Batch job submission failed: Job violates policy",
        "sbatch: error: Batch job submission failed: Rate limit exceeded, please retry later",
        "sbatch: error: Batch job submission failed: Protocol authentication error",
        "sbatch: error: Batch job submission failed: Slurm backup controller in standby mode",
    ],
)
async def test_temporary_errors_are_retryable(engine, slurm, message):
    slurm.define("sbatch", f"echo '{message}' >&2; exit 1")
    with pytest.raises(EngineUnavailableError) as raised:
        await engine.submit(REQUEST)
    assert raised.value.retryable
    assert raised.value.code == "engine_unavailable"


@pytest.mark.parametrize(
    "message",
    [
        "sbatch: error: Batch job submission failed: Requested node configuration is not available",
        "sbatch: error: Batch job submission failed: Invalid partition name specified",
        "sbatch: error: job_submit.lua: not allowed here",
        "/usr/bin/sbatch: unrecognized option '--bogus'",
    ],
)
async def test_refused_job_is_rejected_with_the_reason(engine, slurm, message):
    slurm.define("sbatch", f'echo "{message}" >&2; exit 1')
    with pytest.raises(EngineRejectedError) as raised:
        await engine.submit(REQUEST)
    assert message in raised.value.message
    assert not raised.value.retryable
    assert raised.value.code == "engine_rejected"


@pytest.mark.parametrize("name", ["squeue", "scancel", "sinfo"])
async def test_failed_command_makes_the_engine_unavailable(engine, slurm, name):
    slurm.define(name, "printf 'bad\\033[31m \\nnews\\n' >&2; exit 1")
    calls = {
        "squeue": engine.reconcile_jobs([NAME]),
        "scancel": engine.cancel(NAME),
        "sinfo": engine.maximal_host_sizes(),
    }
    for each, call in calls.items():
        if each != name:
            call.close()
    with pytest.raises(EngineUnavailableError) as raised:
        await calls[name]
    assert "bad" in raised.value.message
    assert raised.value.message.isprintable()


async def test_command_that_hangs_is_killed(engine, slurm, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm_engine, "COMMAND_TIMEOUT_SECONDS", 0.5)
    pid_file = tmp_path / "pid"
    slurm.define("sbatch", f"echo waiting >&2; echo $$ >{pid_file}; exec sleep 100")
    with pytest.raises(EngineUnavailableError, match=r"no response within 0\.5 s; waiting"):
        await engine.submit(REQUEST)
    assert not os.path.exists(f"/proc/{int(pid_file.read_text())}")  # noqa: PTH110


async def test_cancelled_call_kills_its_command(engine, slurm, tmp_path):
    pid_file = tmp_path / "pid"
    slurm.define("squeue", f"echo $$ >{pid_file}.part; mv {pid_file}.part {pid_file}; exec sleep 100")
    call = asyncio.create_task(engine.reconcile_jobs([NAME]))
    while not pid_file.exists():
        await asyncio.sleep(0.02)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert not os.path.exists(f"/proc/{int(pid_file.read_text())}")  # noqa: PTH110


async def test_command_dies_with_the_server(slurm, tmp_path):
    """A command that outlives its server could submit a job that the next server does not expect."""
    pid_file = tmp_path / "pid"
    slurm.define("scancel", f"echo $$ >{pid_file}.part; mv {pid_file}.part {pid_file}; exec sleep 100")
    script = (
        "import asyncio; from sandbox.cluster_engines.slurm.engine import SlurmEngine, SlurmSettings; "
        f"asyncio.run(SlurmEngine(SlurmSettings(commands_dir={str(tmp_path)!r})).cancel({NAME!r}))"
    )
    server = subprocess.Popen([sys.executable, "-c", script])
    try:
        await wait_until(pid_file.exists)
    finally:
        server.kill()
        server.wait()
    process = Path(f"/proc/{int(pid_file.read_text())}/stat")
    await wait_until(lambda: not process.exists() or b") Z" in process.read_bytes())


@pytest.mark.parametrize("stream", ["1", "2"])
async def test_endless_output_is_cut_off(engine, slurm, stream):
    slurm.define("squeue", f"exec yes hostile >&{stream}")
    async with asyncio.timeout(30):
        with pytest.raises(EngineUnavailableError, match="File too large"):
            await engine.reconcile_jobs([NAME])


@pytest.mark.parametrize("output", [r"\0\377\n", f"9|RUN|{NAME}", "1|RUNNING|n1|0:0|0|other|None|"])
async def test_malformed_output_is_not_parsed_as_a_status(engine, slurm, output):
    slurm.define("squeue", f"printf '{output}\\n'")
    if output[0].isdigit():
        with pytest.raises(EngineUnavailableError, match="unknown format"):
            await engine.reconcile_jobs([NAME])
    else:
        assert (await engine.reconcile_jobs([NAME]))[NAME].phase is JobPhase.UNKNOWN


async def test_duplicates_are_cancelled_by_name_state_and_id(engine, slurm):
    """The command must cancel neither another job that has reused the id, nor a duplicate that has started."""
    slurm.define("squeue", f"echo '5|RUNNING|n1|0:0|0|{NAME}|None|'; echo '8|PENDING|n/a|0:0|0|{NAME}|Dependency|'")
    status = (await engine.reconcile_jobs([NAME]))[NAME]
    assert (status.phase, status.duplicate_ids) == (JobPhase.RUNNING, ("8",))
    assert slurm.calls[-1] == ["scancel", "--me", f"--name={NAME}", "--state=PENDING", "8"]


@pytest.mark.parametrize("is_installed", [True, False])
async def test_duplicate_that_cannot_be_cancelled_does_not_hide_the_status(engine, slurm, is_installed):
    slurm.define("squeue", f"echo '5|RUNNING|n1|0:0|0|{NAME}|None|'; echo '8|PENDING|n/a|0:0|0|{NAME}|Dependency|'")
    slurm.define("scancel", "exit 1")
    if not is_installed:
        (slurm.directory / "scancel").unlink()
    assert (await engine.reconcile_jobs([NAME]))[NAME].phase is JobPhase.RUNNING


async def test_cancelled_job_is_selected_only_by_name(engine, slurm):
    await engine.cancel(NAME)
    assert slurm.calls == [["scancel", "--me", f"--name={NAME}"]]


async def test_names_are_passed_in_arguments_of_limited_size(engine, slurm):
    names = [job_name(new_attempt_id()) for _ in range(2 * slurm_engine.NAMES_PER_COMMAND + 1)]
    statuses = await engine.reconcile_jobs(names)
    assert statuses.keys() == set(names)
    assert len(slurm.calls) == 3
    assert max(len(argument) for call in slurm.calls for argument in call) < 128 * 1024
    assert json.dumps(slurm.calls).count("sandbox-") == len(names)


async def test_missing_commands_make_the_engine_unavailable(tmp_path):
    engine = SlurmEngine(SlurmSettings(commands_dir=str(tmp_path)))
    with pytest.raises(EngineUnavailableError, match=r"squeue is not installed; .*cluster\.slurm\.commands"):
        await engine.reconcile_jobs([NAME])


async def test_number_of_concurrent_commands_is_limited(engine, slurm, tmp_path):
    running = tmp_path / "running"
    running.mkdir()
    slurm.define("scancel", f"touch {running}/$$; ls {running} | wc -l >>{tmp_path}/counts; sleep 0.1; rm {running}/$$")
    await asyncio.gather(*(engine.cancel(NAME) for _ in range(12)))
    counts = [int(count) for count in (tmp_path / "counts").read_text().split()]
    assert len(counts) == 12
    assert max(counts) <= slurm_engine.CONCURRENT_COMMANDS_MAX
