"""docs/security.md shows the declared outcome of every attack, and the table refuses what was not asserted."""

import re
from pathlib import Path

import pytest

from escape import table
from escape.attack import OWN_KERNEL, Outcome
from escape.attack_runner import ATTACKS
from escape.attacks_on_collection import LEFT_OUT, NOT_DELIVERED, OUT_OF_PATCH, RUNS_NOTHING, SHOWN, TRAPS
from escape.verdict import Verdict
from escape.verdicts import Collected

ENOUGH = {"network": 30, "credentials": 12, "collection": 15, "resources": 10}


@pytest.fixture
def document(root: Path) -> str:
    return (root / "docs" / "security.md").read_text()


def test_the_table_has_every_attack_and_nothing_else(document: str):
    wanted = [(kind, row) for kind, rows in table.names().items() for row in rows]
    assert list(table.read(document).marks) == wanted, "run script/escape-battery"


def test_no_attack_escapes(document: str):
    marks = table.read(document).marks
    assert [
        (row, tier) for row, row_marks in marks.items() for tier in row_marks if row_marks[tier] == Outcome.ESCAPED
    ] == []


def test_every_mark_is_the_declared_outcome(document: str):
    marks = table.read(document).marks
    declared = {
        ((kind, one.name), tier): one.declared(tier)
        for kind, attacks in ATTACKS.items()
        for one in attacks
        for tier in table.TIERS
    }
    assert [
        (row, tier, mark)
        for row, row_marks in marks.items()
        for tier, mark in row_marks.items()
        if mark not in {declared.get((row, tier), Outcome.HELD), table.NOT_PLAYED}
    ] == [], "run script/escape-battery"


def test_every_attack_was_played_somewhere(document: str):
    marks = table.read(document).marks
    assert [row for row, row_marks in marks.items() if not set(table.PASSED) & set(row_marks.values())] == []


def test_every_outcome_is_explained(document: str):
    explained = document.partition("## The battery")[2].partition("<!-- generated")[0]
    assert [outcome for outcome in (*table.PASSED, Outcome.ESCAPED) if f"| `{outcome}` |" not in explained] == []


def test_attacks_that_stay_inside_are_of_tiers_with_a_kernel_of_their_own():
    inside = {tier for attacks in ATTACKS.values() for one in attacks for tier in one.inside}
    assert inside == set(OWN_KERNEL)


def test_there_are_enough_attacks_of_every_kind():
    names = table.names()
    assert all(len(names[kind]) == len(set(names[kind])) >= least for kind, least in ENOUGH.items())


def test_nobody_wrote_into_the_table_by_hand(document: str):
    assert table.written(document, table.read(document)) == document, "run script/escape-battery"


def test_links_lead_somewhere(root: Path, document: str):
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", document)
    assert len(targets) >= 10
    assert [target for target in targets if not (root / "docs" / target).exists()] == []


def verdicts_of(tier: str) -> dict[str, dict[str, Verdict]]:
    """As they are declared, for every row."""
    declared = {kind: {one.name: Verdict(one.declared(tier), "") for one in ATTACKS[kind]} for kind in ATTACKS}
    traps = {trap.name: Verdict(Outcome.HELD, "") for trap in TRAPS}
    return {**declared, "collection": traps, "outside": {row: Verdict(Outcome.HELD, "") for row in table.SEEN}}


def test_a_tier_has_its_column_and_leaves_the_others_alone(document: str):
    (kind, row), whole = ("network", table.names()["network"][0]), table.read(document)
    before = {place: marks["bubblewrap"] for place, marks in whole.marks.items()}
    verdicts = verdicts_of("qemu")
    verdicts[kind][row] = Verdict(Outcome.ESCAPED, "it succeeded")
    whole.put("qemu", verdicts, "2026-01-29", "QEMU 1")
    again = table.read(table.written(document, whole))
    assert again.marks[kind, row]["qemu"] == Outcome.ESCAPED
    assert {place: marks["bubblewrap"] for place, marks in again.marks.items()} == before
    assert {marks["qemu"] for place, marks in again.marks.items() if place != (kind, row)} == set(table.PASSED)
    assert again.played["qemu"] == ("2026-01-29", "QEMU 1")


@pytest.mark.parametrize("kind", [*ATTACKS, "collection", "outside"])
@pytest.mark.parametrize("verdict", [None, Verdict(Outcome.UNPROVEN, "it only printed")])
def test_a_column_with_a_row_that_was_not_asserted_is_not_written(document: str, kind: str, verdict: Verdict | None):
    verdicts, whole = verdicts_of("qemu"), table.read(document)
    row = next(iter(verdicts[kind]))
    if verdict is None:
        del verdicts[kind][row]
    else:
        verdicts[kind][row] = verdict
    with pytest.raises(table.UnprovenError, match=re.escape(row)):
        whole.put("qemu", verdicts, "2026-01-29", "QEMU 1")
    assert table.written(document, whole) == document


GOOD_PATCH = b"diff --git a/README.md b/README.md\n+changed\n"
TRAP = {trap.must: trap for trap in reversed(TRAPS)}

HEAD = f"# left out: {TRAP[OUT_OF_PATCH].sign}\n".encode()


def collected(
    patch: bytes = GOOD_PATCH, *, paths: tuple[str, ...] = (), told: str = "", is_marked: bool = False
) -> Collected:
    return Collected(patch, [(path, path) for path in ("out/plain.txt", *paths)], [told], is_marked)


@pytest.mark.parametrize(
    ("must", "good", "bad"),
    [
        (RUNS_NOTHING, collected(), collected(is_marked=True)),
        (RUNS_NOTHING, collected(), collected(b"")),
        (
            LEFT_OUT,
            collected(told=f"{TRAP[LEFT_OUT].sign}: it is not a regular file"),
            collected(told=f"{TRAP[LEFT_OUT].sign}: it is not a regular file", paths=(TRAP[LEFT_OUT].sign,)),
        ),
        (LEFT_OUT, collected(told=TRAP[LEFT_OUT].sign), collected()),
        (OUT_OF_PATCH, collected(HEAD + GOOD_PATCH), collected()),
        (OUT_OF_PATCH, collected(HEAD + GOOD_PATCH), collected(HEAD + GOOD_PATCH + HEAD)),
        (NOT_DELIVERED, collected(), collected(paths=(TRAP[NOT_DELIVERED].sign,))),
        (SHOWN, collected(paths=(TRAP[SHOWN].sign,)), collected(paths=(TRAP[SHOWN].sign, "out/\x1b[2J"))),
        (SHOWN, collected(paths=(TRAP[SHOWN].sign,)), collected()),
    ],
)
def test_a_trap_is_held_only_where_the_host_did_what_it_must(must: str, good: Collected, bad: Collected):
    assert good.holds(TRAP[must])
    assert not bad.holds(TRAP[must])
