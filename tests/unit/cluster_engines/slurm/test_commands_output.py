"""Phases of Slurm jobs, and the parsing of squeue and sinfo."""

import random
import re
import time

import pytest

from sandbox.cluster_engines.slurm.commands import (
    UNLIMITED_DISK_BYTES,
    UnexpectedOutputError,
    parse_hosts,
    parse_jobs,
    parse_largest_host_sizes,
    summarize_jobs,
)
from sandbox.interfaces.cluster_engine import EngineHost, JobPhase
from sandbox.model.resources import Resources

NAME = "sandbox-abcdefghij23"
OTHER = "sandbox-zzzzzzzzzzzz"
MIB = 1024**2

# Every job state that squeue prints (job_state_string in Slurm's source), and its phase if the job was started once and
# its script has no exit status.
STATES = {
    "PENDING": JobPhase.WAITING,
    "REQUEUED": JobPhase.WAITING,
    "REQUEUE_FED": JobPhase.WAITING,
    "REQUEUE_HOLD": JobPhase.WAITING,
    "RESV_DEL_HOLD": JobPhase.WAITING,
    "SPECIAL_EXIT": JobPhase.WAITING,
    "RUNNING": JobPhase.RUNNING,
    "CONFIGURING": JobPhase.RUNNING,
    "COMPLETING": JobPhase.RUNNING,
    "SUSPENDED": JobPhase.RUNNING,
    "STOPPED": JobPhase.RUNNING,
    "SIGNALING": JobPhase.RUNNING,
    "RESIZING": JobPhase.RUNNING,
    "STAGE_OUT": JobPhase.RUNNING,
    "COMPLETED": JobPhase.ENDED,
    "FAILED": JobPhase.ENDED,
    "OUT_OF_MEMORY": JobPhase.ENDED,
    "CANCELLED": JobPhase.UNREACHABLE,
    "TIMEOUT": JobPhase.UNREACHABLE,
    "PREEMPTED": JobPhase.UNREACHABLE,
    "DEADLINE": JobPhase.UNREACHABLE,
    "NODE_FAIL": JobPhase.UNREACHABLE,
    "BOOT_FAIL": JobPhase.UNREACHABLE,
    "REVOKED": JobPhase.UNREACHABLE,
    "?": JobPhase.UNREACHABLE,
    "A_NEW_STATE": JobPhase.UNREACHABLE,
}


def line(job_id=1, state="RUNNING", host="n1", status="0:0", restarts=0, name=NAME, reason="None"):
    return f"{job_id}|{state}|{host}|{status}|{restarts}|{name}|{reason}|\n"


def status_of(*lines):
    return summarize_jobs([NAME], parse_jobs("".join(lines))).statuses[NAME]


@pytest.mark.parametrize(("state", "phase"), STATES.items())
def test_each_state_has_a_phase(state, phase):
    assert status_of(line(state=state)).phase is phase


@pytest.mark.parametrize(("state", "is_ending"), [("RUNNING", False), ("COMPLETING", True), ("STAGE_OUT", True)])
def test_job_whose_processes_are_being_ended_is_ending(state, is_ending):
    assert status_of(line(state=state)).is_ending is is_ending


@pytest.mark.parametrize("state", ["CANCELLED", "TIMEOUT", "PREEMPTED", "DEADLINE"])
def test_exit_status_proves_the_end_of_a_job_that_the_controller_ended(state):
    assert status_of(line(state=state, status="143:0")).phase is JobPhase.ENDED
    assert status_of(line(state=state, status="0:9")).phase is JobPhase.ENDED
    assert status_of(line(state=state, status="0:0")).phase is JobPhase.UNREACHABLE
    assert status_of(line(state=state, status="0:0", host="n/a")).phase is JobPhase.ENDED


@pytest.mark.parametrize("host", ["", "n/a", "(null)", "None"])
def test_cancelled_job_without_a_host_has_ended(host):
    status = status_of(line(state="CANCELLED", host=host))
    assert (status.phase, status.host) == (JobPhase.ENDED, "")


def test_exit_status_of_a_failed_host_does_not_prove_the_end_of_the_job():
    """Slurm itself sets the exit status of a job whose host failed."""
    assert status_of(line(state="NODE_FAIL", status="0:1")).phase is JobPhase.UNREACHABLE
    assert status_of(line(state="NODE_FAIL", status="0:1", host="n/a")).phase is JobPhase.UNREACHABLE


@pytest.mark.parametrize("state", ["COMPLETED", "FAILED", "CANCELLED"])
def test_end_of_a_job_that_was_started_twice_is_uncertain(state):
    assert status_of(line(state=state, status="1:0", restarts=0)).phase is JobPhase.ENDED
    assert status_of(line(state=state, status="1:0", restarts=1)).phase is JobPhase.UNREACHABLE
    assert status_of(line(state=state, host="n/a", restarts=1)).phase is JobPhase.UNREACHABLE


def test_refused_job_is_unknown():
    assert status_of(line(state="FAILED", host="n/a", status="0:1")).phase is JobPhase.UNKNOWN
    assert status_of(line(state="FAILED", host="n1", status="0:1")).phase is JobPhase.ENDED


def test_status_has_host_and_reason_and_id():
    status = status_of(line(job_id=7, state="PENDING", host="n/a", reason="Resources"))
    assert (status.host, status.job_id) == ("", "7")
    assert "Resources" in status.reason
    assert status_of(line(host="n2")).host == "n2"
    assert status_of(line(host="n2")).reason == ""
    assert "exit code 7" in status_of(line(state="FAILED", status="7:0")).reason
    assert "signal 9" in status_of(line(state="CANCELLED", status="0:9")).reason
    assert "n1 has not confirmed" in status_of(line(state="NODE_FAIL")).reason
    assert "no host has confirmed" in status_of(line(state="CANCELLED", host="n/a", restarts=1)).reason
    assert "SUSPENDED" in status_of(line(state="SUSPENDED")).reason


def test_reason_is_printable_and_short():
    assert "\x1b" not in status_of(line(state="PENDING", reason="\x1b[31m")).reason
    assert len(status_of(line(state="PENDING", reason="x" * 10_000)).reason) < 300


@pytest.mark.parametrize("reason", ["", "a|b", "|", "first\nsecond", f"first\n|{NAME}|"])
def test_reason_may_contain_separators(reason):
    status = status_of(line(job_id=3, state="PENDING", host="n/a", reason=reason), line(4, name=OTHER))
    assert (status.phase, status.job_id) == (JobPhase.WAITING, "3")


@pytest.mark.parametrize(
    "text",
    [
        "1|RUNNING",
        "1|running|n1|0:0|0|sandbox-abcdefghij23|None|",
        "1|RUNNING|n 1|0:0|0|sandbox-abcdefghij23|None|",
        "1|RUNNING|n1|0|0|sandbox-abcdefghij23|None|",
        "1|RUNNING|n1|0:0|0|../../etc|None|",
        "1_2|RUNNING|n1|0:0|0|sandbox-abcdefghij23|None|",
    ],
)
def test_unknown_format_is_an_error(text):
    """A job that is not recognized would be UNKNOWN, and would be submitted again."""
    with pytest.raises(UnexpectedOutputError):
        list(parse_jobs(f"{line(1)}{text}\n"))


def test_text_that_is_not_a_job_is_ignored():
    assert status_of("slurm_load_jobs: warning\n", "\n", "|||||||\n", line(2)).job_id == "2"
    assert status_of("\0\x1b\n").phase is JobPhase.UNKNOWN


def test_jobs_with_other_names_are_ignored():
    assert status_of(line(name=OTHER)).phase is JobPhase.UNKNOWN


def test_every_name_has_a_status():
    statuses = summarize_jobs([OTHER, NAME], parse_jobs(line(5))).statuses
    assert [statuses[name].phase for name in (OTHER, NAME)] == [JobPhase.UNKNOWN, JobPhase.RUNNING]


@pytest.mark.parametrize(
    ("states", "first", "waiting_duplicates", "duplicates"),
    [
        (["RUNNING", "PENDING"], 1, ["2"], ("2",)),
        (["PENDING", "RUNNING"], 2, ["1"], ("1",)),
        (["PENDING", "PENDING", "PENDING"], 1, ["2", "3"], ("2", "3")),
        (["NODE_FAIL", "PENDING"], 1, ["2"], ("2",)),
        (["PENDING", "COMPLETED"], 2, ["1"], ("1",)),
        (["NODE_FAIL", "RUNNING"], 2, [], ("1",)),
        (["COMPLETED", "NODE_FAIL"], 2, [], ("1",)),
        (["RUNNING", "RUNNING"], 1, [], ("2",)),
        (["COMPLETED", "RUNNING"], 2, [], ("1",)),
    ],
)
def test_job_that_was_started_determines_the_status_of_duplicates(states, first, waiting_duplicates, duplicates):
    lines = [
        line(number, state, "n/a" if state == "PENDING" else "n1", reason="x") for number, state in enumerate(states, 1)
    ]
    for order in (lines, lines[::-1]):
        queued = summarize_jobs([NAME], parse_jobs("".join(order)))
        assert queued.statuses[NAME].job_id == str(first)
        assert queued.statuses[NAME].duplicate_ids == duplicates
        assert list(queued.waiting_duplicates.get(NAME, [])) == waiting_duplicates


def test_cancelled_duplicate_is_not_reported():
    """A job that was cancelled before it started does not hide the job that was kept."""
    cancelled = line(1, "CANCELLED", "n/a")
    status = status_of(cancelled, line(2, "PENDING", "n/a"))
    assert (status.phase, status.job_id, status.duplicate_ids) == (JobPhase.WAITING, "2", ())
    assert status_of(cancelled).phase is JobPhase.ENDED


def test_largest_hosts_are_found():
    output = "4|8000|50000|p*\n64|4000|50000|p*\n4|8000|40000|p*\n128|999999|0|other\n"
    expected = [Resources(64, 4000 * MIB, 50_000 * MIB), Resources(4, 8000 * MIB, 50_000 * MIB)]
    assert parse_largest_host_sizes(output, None) == expected
    assert parse_largest_host_sizes("128|999999|0|other\n", "other") == [
        Resources(128, 999_999 * MIB, UNLIMITED_DISK_BYTES)
    ]
    assert parse_largest_host_sizes("128|999999|0|other\n", None) == []
    assert parse_largest_host_sizes("4+|8000+|0+|p*\n", None) == [Resources(4, 8000 * MIB, UNLIMITED_DISK_BYTES)]


@pytest.mark.parametrize("output", ["4|8000|p*\n", "x|8000|0|p*\n", "-4|8000|0|p*\n", "4|8000|0|\n"])
def test_unknown_host_format_is_an_error(output):
    with pytest.raises(UnexpectedOutputError, match=re.escape(output.strip())):
        parse_largest_host_sizes(output, None)


def test_largest_hosts_do_not_fit_in_any_other_host():
    rng = random.Random(3)
    for _ in range(300):
        hosts = {Resources(*(rng.randrange(5) for _ in range(3))) for _ in range(rng.randrange(1, 30))}
        output = "".join(f"{host.cpus}|{host.memory_bytes}|{host.disk_bytes}|p*\n" for host in hosts)
        parsed = {Resources(h.cpus, h.memory_bytes * MIB, h.disk_bytes * MIB or UNLIMITED_DISK_BYTES) for h in hosts}
        expected = {host for host in parsed if not any(host != other and host.fits_in(other) for other in parsed)}
        found = parse_largest_host_sizes(output, None)
        assert (set(found), len(found)) == (expected, len(expected))
        assert [host.cpus for host in found] == sorted((host.cpus for host in found), reverse=True)


def test_many_different_hosts_are_parsed_in_a_short_time():
    output = "".join(f"{number}|{30_000 - number}|5000|p*\n" for number in range(1, 30_000))
    start = time.process_time()
    assert len(parse_largest_host_sizes(output, None)) == 29_999
    assert time.process_time() - start < 5


def host_line(name, state, rest="4|8000|50000|p*"):
    return f"{name}|{state}|{rest}\n"


def test_hosts_are_listed_once_with_their_state():
    """A host is printed for each of its partitions."""
    output = host_line("n2", "idle") + host_line("n10", "mixed", "8|16000|0|p*") + host_line("n2", "idle", "4|1|1|q")
    assert parse_hosts(output, None) == [
        EngineHost("n10", Resources(8, 16_000 * MIB, UNLIMITED_DISK_BYTES)),
        EngineHost("n2", Resources(4, 8000 * MIB, 50_000 * MIB)),
    ]
    assert parse_hosts(host_line("n2", "idle", "4|1|1|q"), None) == []
    assert [host.name for host in parse_hosts(host_line("n2", "idle", "4|1|1|q"), "q")] == ["n2"]


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        ("idle", ""),
        ("idle~", ""),
        ("mixed-", ""),
        ("ALLOCATED", ""),
        ("idle*", "Slurm reports the state idle*."),
        ("drained", "Slurm reports the state drained."),
        ("down*", "Slurm reports the state down*."),
        ("some_new_state", "Slurm reports the state some_new_state."),
    ],
)
def test_host_on_which_slurm_starts_no_jobs_has_a_problem(state, problem):
    [host] = parse_hosts(host_line("n1", state), None)
    assert host.problem == problem


@pytest.mark.parametrize(
    "output",
    [
        *(host_line(name, "idle") for name in ("", "-n", "n1,n2", "n[1-2]", "n 1", "é", "n" * 254, "\x1b[31mn")),
        *(host_line("n1", state) for state in ("", "a b", "x" * 41, "idle" + "*" * 5, "\x1b")),
        *(host_line("n1", "idle", rest) for rest in ("4|8000|p*", "x|1|1|p*", "9999999999|1|1|p*", "4|1|1|")),
        "4|8000|50000|p*\n",
    ],
)
def test_unknown_format_of_a_host_is_an_error(output):
    with pytest.raises(UnexpectedOutputError):
        parse_hosts(output, None)


def test_many_hosts_are_listed_in_a_short_time():
    output = "".join(host_line(f"n{number}", "idle") for number in range(30_000))
    start = time.process_time()
    assert len(parse_hosts(output, None)) == 30_000
    assert time.process_time() - start < 5
