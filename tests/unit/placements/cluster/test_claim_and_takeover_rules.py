"""Decisions about workers, tested individually and in a small model of workers, clocks, messages and an engine."""

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sandbox.interfaces.cluster_engine import JobPhase
from sandbox.placements.cluster.claim_and_takeover_rules import (
    CLAIM_TIMEOUT_SECONDS,
    LAST_RECORDS_TIMEOUT_SECONDS,
    LEASE_MARGIN_SECONDS,
    ClaimState,
    Decision,
    Observation,
    decide,
    may_claim,
    takeover_seconds,
)

LEASE = 600.0
DRIFT = 0.01
"""The clocks of a host and of the server may each run faster or slower than true time by this fraction."""
ANY_PHASE = st.sampled_from([*JobPhase, None])
RATES = st.sampled_from([1 - DRIFT, 1 + DRIFT])
PAUSES = st.sampled_from([1.0, LEASE_MARGIN_SECONDS, LEASE / 2, LEASE - 1, LEASE, LEASE + LEASE_MARGIN_SECONDS])


@pytest.mark.parametrize(
    ("phase", "seconds", "decision"),
    [
        (JobPhase.WAITING, 1e6, Decision.WAIT),
        (None, 1e6, Decision.WAIT),
        (JobPhase.UNKNOWN, 0, Decision.SUBMIT),
        (JobPhase.ENDED, 0, Decision.REPLACE),
        (JobPhase.UNREACHABLE, 0, Decision.REPLACE),
        (JobPhase.RUNNING, CLAIM_TIMEOUT_SECONDS - 1, Decision.WAIT),
        (JobPhase.RUNNING, CLAIM_TIMEOUT_SECONDS, Decision.REPLACE),
    ],
)
def test_decision_about_an_unclaimed_attempt_depends_on_its_job(phase, seconds, decision):
    assert decide(Observation(False, False, 1e6, phase, seconds), LEASE) is decision


@pytest.mark.parametrize("phase", [*JobPhase, None])
def test_claimed_attempt_is_taken_over_after_its_lease(phase):
    if phase is not JobPhase.ENDED:
        silent = LEASE + LEASE_MARGIN_SECONDS - 1
        assert decide(Observation(True, False, silent, phase, 1e6), LEASE) is Decision.WAIT
    assert decide(Observation(True, True, LEASE + LEASE_MARGIN_SECONDS, phase), LEASE) is Decision.TAKE_OVER


@pytest.mark.parametrize(
    ("is_connected", "seconds", "decision"),
    [
        (False, 0, Decision.TAKE_OVER),
        (True, 0, Decision.WAIT),
        (True, LAST_RECORDS_TIMEOUT_SECONDS, Decision.TAKE_OVER),
    ],
)
def test_ended_job_is_taken_over_once_its_connection_has_ended(is_connected, seconds, decision):
    assert decide(Observation(True, is_connected, 0, JobPhase.ENDED, seconds), LEASE) is decision


@pytest.mark.parametrize(
    ("state", "token", "nonce", "is_allowed"),
    [
        (ClaimState((b"t",), None, False), b"t", b"n", True),
        (ClaimState((b"s", b"t"), None, False), b"t", b"n", True),
        (ClaimState((b"t",), b"n", False), b"t", b"n", True),
        (ClaimState((b"t",), b"m", False), b"t", b"n", False),
        (ClaimState((b"t",), None, False), b"s", b"n", False),
        (ClaimState((b"t",), b"n", True), b"t", b"n", False),
        (ClaimState((), None, False), b"", b"n", False),
    ],
)
def test_only_one_worker_may_claim_an_attempt(state, token, nonce, is_allowed):
    assert may_claim(state, token, nonce) is is_allowed


@pytest.mark.parametrize("lease", [1.0, 600.0, 3600.0, 604_800.0])
def test_margin_covers_clock_drift(lease):
    assert takeover_seconds(lease) >= lease + 30
    slow_host, fast_server = 1 - DRIFT, 1 + DRIFT
    assert takeover_seconds(lease) / fast_server > lease / slow_host


@dataclass
class Worker:
    """A worker, and the clock of its host (CLOCK_BOOTTIME). An engine may start two workers for one job."""

    job: int
    nonce: bytes
    rate: float
    seconds_since_boot: float = 0.0
    deadline: float = float("-inf")
    has_runner: bool = False
    is_alive: bool = True
    sent: list = field(default_factory=list)
    """The send times of messages that the server has not received yet."""
    answers: list = field(default_factory=list)
    """The send times of messages whose answers the worker has not received yet."""

    @property
    def can_communicate(self):
        return self.is_alive and self.has_runner and self.seconds_since_boot < self.deadline


@dataclass
class Job:
    """A job as seen by the server. The server stores all fields except the last two, which it keeps only in memory."""

    number: int
    nonce: bytes | None = None
    is_abandoned: bool = False
    answered_at: float = 0.0
    phase: JobPhase | None = None

    @property
    def claim(self):
        return ClaimState((b"token",), self.nonce, self.is_abandoned)


class ClusterModel(RuleBasedStateMachine):
    """One task, its jobs and workers. Messages and the engine's reports can be delayed and reordered."""

    @initialize(rate=RATES)
    def start(self, rate):
        self.server_rate, self.server_time = rate, 0.0
        self.numbers, self.nonces = itertools.count(), itertools.count()
        self.jobs, self.workers = [], []
        self.submitted, self.ended = set(), set()
        self.replace()

    def replace(self):
        self.jobs.append(Job(next(self.numbers), answered_at=self.server_time))

    @property
    def job(self):
        return self.jobs[-1]

    def pick(self, data, condition):
        return data.draw(st.sampled_from([worker for worker in self.workers if condition(worker)]))

    @rule(seconds=PAUSES | st.floats(0, 2 * LEASE))
    def wait(self, seconds):
        self.pass_time(seconds)

    def pass_time(self, seconds):
        self.server_time += seconds * self.server_rate
        for worker in self.workers:
            worker.seconds_since_boot += seconds * worker.rate

    @precondition(lambda self: self.submitted and len(self.workers) < 6)
    @rule(data=st.data(), rate=RATES, seconds_since_boot=st.floats(0, 1e4))
    def engine_starts_a_worker(self, data, rate, seconds_since_boot):
        """An engine may also start a job that the server has abandoned, or start a job twice."""
        number = data.draw(st.sampled_from(sorted(self.submitted)))
        self.workers.append(Worker(number, b"%d" % next(self.nonces), rate, seconds_since_boot))

    @precondition(lambda self: len(self.workers) < 6 and self.job.number not in self.ended)
    @rule(rate=RATES)
    def current_job_runs(self, rate):
        """The common case. Without this rule, long runs would consist mainly of rare events."""
        self.submitted.add(self.job.number)
        self.workers.append(Worker(self.job.number, b"%d" % next(self.nonces), rate))
        self.exchange(self.workers[-1], starts=True)

    @precondition(lambda self: any(worker.is_alive for worker in self.workers))
    @rule(data=st.data())
    def worker_renews(self, data):
        """Send a message, which is answered without delay."""
        self.exchange(self.pick(data, lambda each: each.is_alive), starts=False)

    def exchange(self, worker, *, starts):
        worker.sent.append(worker.seconds_since_boot)
        self.answer(worker, -1)
        if worker.answers:
            self.receive(worker, -1, starts=starts)

    @precondition(lambda self: any(worker.is_alive for worker in self.workers))
    @rule(data=st.data())
    def worker_sends(self, data):
        """Send a claim or a heartbeat. The server answers both by the same rules."""
        worker = self.pick(data, lambda each: each.is_alive)
        worker.sent.append(worker.seconds_since_boot)

    @precondition(lambda self: any(worker.sent for worker in self.workers))
    @rule(data=st.data())
    def server_answers(self, data):
        worker = self.pick(data, lambda each: each.sent)
        self.answer(worker, data.draw(st.integers(0, len(worker.sent) - 1)))

    def answer(self, worker, index):
        sent_at = worker.sent.pop(index)
        job = self.jobs[worker.job]
        if may_claim(job.claim, b"token", worker.nonce):
            job.nonce, job.answered_at = worker.nonce, self.server_time
            worker.answers.append(sent_at)

    @precondition(lambda self: any(worker.answers and worker.is_alive for worker in self.workers))
    @rule(data=st.data(), starts=st.booleans())
    def worker_receives(self, data, starts):
        worker = self.pick(data, lambda each: each.answers and each.is_alive)
        self.receive(worker, data.draw(st.integers(0, len(worker.answers) - 1)), starts=starts)

    def receive(self, worker, index, *, starts):
        sent_at = worker.answers.pop(index)
        worker.deadline = max(worker.deadline, sent_at + LEASE)
        worker.has_runner = worker.has_runner or starts

    @precondition(lambda self: any(worker.is_alive for worker in self.workers))
    @rule(data=st.data())
    def worker_dies(self, data):
        """The kernel kills the runner together with the worker."""
        self.pick(data, lambda each: each.is_alive).is_alive = False

    @rule(phase=ANY_PHASE)
    def engine_reports(self, phase):
        """Any report is possible at any time, except that a job with live workers is never reported as ended."""
        is_alive = any(worker.is_alive for worker in self.workers if worker.job == self.job.number)
        if phase is JobPhase.ENDED:
            if is_alive:
                return
            self.submitted.discard(self.job.number)
            self.ended.add(self.job.number)
        self.job.phase = phase

    @rule()
    def server_restarts(self):
        """The new server waits for a whole lease, because the old server may have answered until it stopped."""
        for job in self.jobs:
            job.answered_at, job.phase = self.server_time, None

    @rule(is_connected=st.booleans(), phase_seconds=st.floats(0, 2 * CLAIM_TIMEOUT_SECONDS), pause=PAUSES)
    def server_decides(self, is_connected, phase_seconds, pause):
        self.pass_time(pause)
        job = self.job
        seconds_since_answer = self.server_time - job.answered_at
        observed = Observation(job.nonce is not None, is_connected, seconds_since_answer, job.phase, phase_seconds)
        match decide(observed, LEASE):
            case Decision.SUBMIT:
                self.submitted |= {job.number} - self.ended
            case Decision.REPLACE | Decision.TAKE_OVER:
                job.is_abandoned = True
                self.replace()

    @invariant()
    def one_attempt_communicates(self):
        assert sum(worker.can_communicate for worker in getattr(self, "workers", ())) <= 1


ClusterModel.TestCase.settings = settings(max_examples=500, stateful_step_count=15, deadline=None)
TestCluster = ClusterModel.TestCase
