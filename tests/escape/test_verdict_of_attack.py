"""The verdict on an attack can fail: every wrong outcome is fed to it."""

import dataclasses

import pytest

from escape.attack import CLOCK_SKEW_SECONDS, Attack, Evidence, Outcome
from escape.host_watch import WITNESSES
from escape.verdict import judge_attack
from escape.verdicts import judge_watch

ATTACK = Attack(
    "an attack",
    "",
    "",
    ("EPERM", "ENOENT"),
    inside=("gvisor",),
    unchanged=("mounts", "files"),
    host_paths=("/etc/shadow", "CANARY"),
    packet=("udp", "PUBLIC", 53),
)
BEGIN, END = 100.0, 106.0
OFTEN = tuple((90 + 0.5 * number, 90.4 + 0.5 * number) for number in range(60))
QUIET = Evidence({name: [] for name in WITNESSES}, samples=OFTEN)
THROUGH = {"outcome": "through", "by": [], "said": "", "held": [BEGIN, END]}
REFUSED = {"outcome": "refused", "by": ["EPERM"], "said": ""}


def outcome(report, *, tier="bubblewrap", twin=THROUGH, evidence=QUIET):
    return judge_attack(ATTACK, tier, {"attack": report, "twin": twin}, evidence).outcome


def test_an_attack_that_is_refused_where_that_is_declared_is_refused():
    assert outcome(REFUSED) is Outcome.REFUSED
    assert outcome({**REFUSED, "by": ["EPERM", "ENOENT"]}) is Outcome.REFUSED


def test_an_attack_that_succeeds_where_that_is_declared_is_inside_only():
    assert outcome(THROUGH, tier="gvisor") is Outcome.INSIDE


@pytest.mark.parametrize("tier", ["bubblewrap", "qemu"])
def test_an_attack_that_succeeds_where_that_is_not_declared_has_escaped(tier):
    assert outcome(THROUGH, tier=tier) is Outcome.ESCAPED


def test_an_attack_that_is_refused_where_it_is_declared_to_succeed_is_unproven():
    assert outcome(REFUSED, tier="gvisor") is Outcome.UNPROVEN


@pytest.mark.parametrize("tier", ["bubblewrap", "gvisor"])
@pytest.mark.parametrize(
    "report",
    [
        {"outcome": "silent", "by": [], "said": "THROUGH"},
        {"outcome": "silent", "by": [], "said": "refused: Operation not permitted"},
        {"outcome": "silent", "by": [], "said": ""},
        {"outcome": "hung", "by": [], "said": ""},
        {"outcome": "broken", "by": ["NameError: name 'x' is not defined"], "said": ""},
        {"outcome": "broken", "by": ["MeansFailedError: no terminal"], "said": ""},
        {"outcome": "refused", "by": [], "said": ""},
        {"outcome": "refused", "by": ["EINVAL"], "said": ""},
        {"outcome": "refused", "by": ["EPERM", "EINVAL"], "said": ""},
        {"outcome": "refused", "by": ["SIGSEGV"], "said": ""},
        {"said": "EPERM"},
        {},
    ],
)
def test_everything_else_that_an_attack_reports_is_unproven(tier, report):
    assert outcome(report, tier=tier) is Outcome.UNPROVEN


@pytest.mark.parametrize("twin", [REFUSED, {"outcome": "silent", "by": [], "said": "THROUGH"}, {"outcome": "hung"}, {}])
@pytest.mark.parametrize(("report", "tier"), [(REFUSED, "bubblewrap"), (THROUGH, "gvisor")])
def test_nothing_is_proven_next_to_a_twin_that_failed(report, tier, twin):
    assert outcome(report, tier=tier, twin=twin) is Outcome.UNPROVEN


@pytest.mark.parametrize("result", [{}, {"attack": REFUSED}, {"twin": THROUGH}])
def test_nothing_is_proven_of_what_was_not_played(result):
    assert judge_attack(ATTACK, "bubblewrap", result, QUIET).outcome is Outcome.UNPROVEN


@pytest.mark.parametrize(("report", "tier"), [(REFUSED, "bubblewrap"), (THROUGH, "gvisor"), ({}, "gvisor")])
@pytest.mark.parametrize("name", ATTACK.unchanged)
def test_a_change_on_the_host_is_an_escape_whatever_was_reported(report, tier, name):
    changed = Evidence({**QUIET.changes, name: ["something"]}, samples=OFTEN)
    assert outcome(report, tier=tier, evidence=changed) is Outcome.ESCAPED


def test_a_change_that_another_attack_is_about_does_not_count_for_this_one():
    changed = Evidence({**QUIET.changes, "keys": ["something"]}, samples=OFTEN)
    assert outcome(THROUGH, tier="gvisor", evidence=changed) is Outcome.INSIDE
    assert judge_watch(changed).outcome is Outcome.ESCAPED


@pytest.mark.parametrize(("report", "tier"), [(REFUSED, "bubblewrap"), (THROUGH, "gvisor")])
def test_nothing_is_proven_where_the_host_was_not_watched(report, tier):
    unwatched = Evidence({"files": []}, samples=OFTEN)
    assert outcome(report, tier=tier, evidence=unwatched) is Outcome.UNPROVEN
    assert outcome(report, tier=tier, evidence=Evidence({})) is Outcome.UNPROVEN
    assert judge_watch(unwatched).outcome is Outcome.UNPROVEN
    assert judge_watch(QUIET).outcome is Outcome.HELD


@pytest.mark.parametrize(
    "samples",
    [
        (),
        tuple(one for one in OFTEN if not BEGIN <= one[0] <= END),
        ((BEGIN - 1, END - 2),),
        ((BEGIN + 2, END + 1),),
        ((BEGIN + CLOCK_SKEW_SECONDS - 0.1, END - CLOCK_SKEW_SECONDS),),
        ((BEGIN + CLOCK_SKEW_SECONDS, END - CLOCK_SKEW_SECONDS + 0.1),),
    ],
)
def test_success_is_unproven_unless_the_host_was_looked_at_while_it_lasted(samples):
    assert outcome(THROUGH, tier="gvisor", evidence=dataclasses.replace(QUIET, samples=samples)) is Outcome.UNPROVEN
    assert outcome(REFUSED, evidence=dataclasses.replace(QUIET, samples=samples)) is Outcome.REFUSED


def test_success_that_was_not_held_is_unproven():
    assert outcome({"outcome": "through", "by": [], "said": ""}, tier="gvisor") is Outcome.UNPROVEN


def test_nothing_is_proven_by_the_absence_of_what_the_host_has_not_got():
    absent = {**REFUSED, "by": ["ENOENT"]}
    some = dataclasses.replace(QUIET, missing=frozenset({"/etc/shadow"}))
    none = dataclasses.replace(QUIET, missing=frozenset({"/etc/shadow", "CANARY"}))
    assert outcome(absent, evidence=some) is Outcome.REFUSED
    assert outcome(absent, evidence=none) is Outcome.UNPROVEN


def test_a_packet_outside_is_an_escape_even_when_nothing_answered():
    sent = dataclasses.replace(QUIET, packets=frozenset({("udp", "PUBLIC", 53)}))
    assert outcome(REFUSED, evidence=sent) is Outcome.ESCAPED
    other = dataclasses.replace(QUIET, packets=frozenset({("udp", "PUBLIC", 54)}))
    assert outcome(REFUSED, evidence=other) is Outcome.REFUSED


@pytest.mark.parametrize(
    "declared",
    [
        {"inside": ("bubblewrap",), "unchanged": ("files",)},
        {"inside": ("gvisor",)},
        {"unchanged": ("no such witness",)},
        {"refused_by": ("ENOENT",)},
        {"refused_by": ()},
    ],
)
def test_a_declaration_that_could_not_fail_is_not_accepted(declared):
    with pytest.raises(AssertionError):
        Attack("an attack", "", "", **declared)
