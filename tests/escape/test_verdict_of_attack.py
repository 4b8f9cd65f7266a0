"""The verdict on an attack is neither REFUSED nor INSIDE if anything contradicts the declared outcome."""

import dataclasses

import pytest

from escape.attack import CLOCK_SKEW_SECONDS, Attack, Evidence, Outcome
from escape.attack_verdict import judge_attack
from escape.host_watch import OBSERVERS
from escape.run_verdicts import judge_watch

ATTACK = Attack(
    "an attack",
    "",
    "",
    ("EPERM", "ENOENT"),
    allowed_inside=("gvisor",),
    unchanged_observers=("mounts", "files"),
    host_paths=("/etc/shadow", "CANARY"),
    packet=("udp", "PUBLIC", 53),
)
BEGIN, END = 100.0, 106.0
SAMPLES = tuple((90 + 0.5 * number, 90.4 + 0.5 * number) for number in range(60))
UNCHANGED = Evidence({name: [] for name in OBSERVERS}, samples=SAMPLES)
SUCCEEDED = {"outcome": "succeeded", "by": [], "output": "", "held": [BEGIN, END]}
REFUSED = {"outcome": "refused", "by": ["EPERM"], "output": ""}


def outcome(report, *, runtime="bubblewrap", control=SUCCEEDED, evidence=UNCHANGED):
    return judge_attack(ATTACK, runtime, {"attack": report, "control": control}, evidence).outcome


def test_expected_refusal_has_the_outcome_refused():
    assert outcome(REFUSED) is Outcome.REFUSED
    assert outcome({**REFUSED, "by": ["EPERM", "ENOENT"]}) is Outcome.REFUSED


def test_expected_success_has_the_outcome_inside():
    assert outcome(SUCCEEDED, runtime="gvisor") is Outcome.INSIDE


@pytest.mark.parametrize("runtime", ["bubblewrap", "qemu"])
def test_unexpected_success_is_an_escape(runtime):
    assert outcome(SUCCEEDED, runtime=runtime) is Outcome.ESCAPED


def test_unexpected_refusal_is_unproven():
    assert outcome(REFUSED, runtime="gvisor") is Outcome.UNPROVEN


@pytest.mark.parametrize("runtime", ["bubblewrap", "gvisor"])
@pytest.mark.parametrize(
    "report",
    [
        {"outcome": "silent", "by": [], "output": "THROUGH"},
        {"outcome": "silent", "by": [], "output": "refused: Operation not permitted"},
        {"outcome": "silent", "by": [], "output": ""},
        {"outcome": "hung", "by": [], "output": ""},
        {"outcome": "error", "by": ["NameError: name 'x' is not defined"], "output": ""},
        {"outcome": "error", "by": ["SetupFailedError: no terminal"], "output": ""},
        {"outcome": "refused", "by": [], "output": ""},
        {"outcome": "refused", "by": ["EINVAL"], "output": ""},
        {"outcome": "refused", "by": ["EPERM", "EINVAL"], "output": ""},
        {"outcome": "refused", "by": ["SIGSEGV"], "output": ""},
        {"output": "EPERM"},
        {},
    ],
)
def test_unexpected_reports_are_unproven(runtime, report):
    assert outcome(report, runtime=runtime) is Outcome.UNPROVEN


@pytest.mark.parametrize(
    "control", [REFUSED, {"outcome": "silent", "by": [], "output": "THROUGH"}, {"outcome": "hung"}, {}]
)
@pytest.mark.parametrize(("report", "runtime"), [(REFUSED, "bubblewrap"), (SUCCEEDED, "gvisor")])
def test_attack_with_a_failed_control_is_unproven(report, runtime, control):
    assert outcome(report, runtime=runtime, control=control) is Outcome.UNPROVEN


@pytest.mark.parametrize("result", [{}, {"attack": REFUSED}, {"control": SUCCEEDED}])
def test_attack_that_was_not_run_is_unproven(result):
    assert judge_attack(ATTACK, "bubblewrap", result, UNCHANGED).outcome is Outcome.UNPROVEN


@pytest.mark.parametrize(("report", "runtime"), [(REFUSED, "bubblewrap"), (SUCCEEDED, "gvisor"), ({}, "gvisor")])
@pytest.mark.parametrize("name", ATTACK.unchanged_observers)
def test_host_change_is_an_escape_regardless_of_the_report(report, runtime, name):
    changed = Evidence({**UNCHANGED.changes, name: ["something"]}, samples=SAMPLES)
    assert outcome(report, runtime=runtime, evidence=changed) is Outcome.ESCAPED


def test_change_found_by_an_undeclared_observer_does_not_affect_the_attack():
    changed = Evidence({**UNCHANGED.changes, "keys": ["something"]}, samples=SAMPLES)
    assert outcome(SUCCEEDED, runtime="gvisor", evidence=changed) is Outcome.INSIDE
    assert judge_watch(changed).outcome is Outcome.ESCAPED


@pytest.mark.parametrize(("report", "runtime"), [(REFUSED, "bubblewrap"), (SUCCEEDED, "gvisor")])
def test_attack_that_the_host_watch_did_not_observe_is_unproven(report, runtime):
    unwatched = Evidence({"files": []}, samples=SAMPLES)
    assert outcome(report, runtime=runtime, evidence=unwatched) is Outcome.UNPROVEN
    assert outcome(report, runtime=runtime, evidence=Evidence({})) is Outcome.UNPROVEN
    assert judge_watch(unwatched).outcome is Outcome.UNPROVEN
    assert judge_watch(UNCHANGED).outcome is Outcome.REQUIREMENT_MET


@pytest.mark.parametrize(
    "samples",
    [
        (),
        tuple(sample for sample in SAMPLES if not BEGIN <= sample[0] <= END),
        ((BEGIN - 1, END - 2),),
        ((BEGIN + 2, END + 1),),
        ((BEGIN + CLOCK_SKEW_SECONDS - 0.1, END - CLOCK_SKEW_SECONDS),),
        ((BEGIN + CLOCK_SKEW_SECONDS, END - CLOCK_SKEW_SECONDS + 0.1),),
    ],
)
def test_success_is_unproven_without_a_sample_during_the_hold_time(samples):
    assert (
        outcome(SUCCEEDED, runtime="gvisor", evidence=dataclasses.replace(UNCHANGED, samples=samples))
        is Outcome.UNPROVEN
    )
    assert outcome(REFUSED, evidence=dataclasses.replace(UNCHANGED, samples=samples)) is Outcome.REFUSED


def test_success_is_unproven_if_its_report_has_no_hold_time():
    assert outcome({"outcome": "succeeded", "by": [], "output": ""}, runtime="gvisor") is Outcome.UNPROVEN


def test_enoent_is_unproven_if_no_path_exists_on_the_host():
    not_found = {**REFUSED, "by": ["ENOENT"]}
    one_missing = dataclasses.replace(UNCHANGED, missing_paths=frozenset({"/etc/shadow"}))
    all_missing = dataclasses.replace(UNCHANGED, missing_paths=frozenset({"/etc/shadow", "CANARY"}))
    assert outcome(not_found, evidence=one_missing) is Outcome.REFUSED
    assert outcome(not_found, evidence=all_missing) is Outcome.UNPROVEN


def test_packet_that_left_the_sandbox_is_an_escape_despite_a_refusal():
    with_packet = dataclasses.replace(UNCHANGED, packets=frozenset({("udp", "PUBLIC", 53)}))
    assert outcome(REFUSED, evidence=with_packet) is Outcome.ESCAPED
    with_other_packet = dataclasses.replace(UNCHANGED, packets=frozenset({("udp", "PUBLIC", 54)}))
    assert outcome(REFUSED, evidence=with_other_packet) is Outcome.REFUSED


@pytest.mark.parametrize(
    "fields",
    [
        {"allowed_inside": ("bubblewrap",), "unchanged_observers": ("files",)},
        {"allowed_inside": ("gvisor",)},
        {"unchanged_observers": ("no such observer",)},
        {"denial_words": ("ENOENT",)},
        {"denial_words": ()},
    ],
)
def test_incomplete_or_contradictory_declaration_is_rejected(fields):
    with pytest.raises(AssertionError):
        Attack("an attack", "", "", **fields)
