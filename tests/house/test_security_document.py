"""docs/security.md shows what came of every attack, and the table tells a failure as one."""

import re
from pathlib import Path

import pytest

from escape import table
from escape.attacks_on_collection import LEFT_OUT, NOT_DELIVERED, OUT_OF_PATCH, RUNS_NOTHING, SHOWN, TRAPS
from escape.battery import THROUGH
from escape.verdicts import Collected, is_held

ENOUGH = {"network": 30, "credentials": 12, "collection": 15, "resources": 10}


@pytest.fixture
def document(root: Path) -> str:
    return (root / "docs" / "security.md").read_text()


def test_the_table_has_every_attack_and_nothing_else(document: str):
    wanted = [(kind, row) for kind, rows in table.names().items() for row in rows]
    assert list(table.read(document).marks) == wanted, "run script/escape-battery"


def test_no_attack_goes_through(document: str):
    marks = table.read(document).marks
    assert [
        (row, tier) for row, row_marks in marks.items() for tier in row_marks if row_marks[tier] == table.THROUGH
    ] == []


def test_every_attack_was_played_somewhere(document: str):
    marks = table.read(document).marks
    assert [row for row, row_marks in marks.items() if table.HELD not in row_marks.values()] == []


def test_there_are_enough_attacks_of_every_kind():
    names = table.names()
    assert all(len(names[kind]) == len(set(names[kind])) >= least for kind, least in ENOUGH.items())


def test_nobody_wrote_into_the_table_by_hand(document: str):
    assert table.written(document, table.read(document)) == document, "run script/escape-battery"


def test_links_lead_somewhere(root: Path, document: str):
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", document)
    assert len(targets) >= 10
    assert [target for target in targets if not (root / "docs" / target).exists()] == []


@pytest.mark.parametrize(
    ("attack", "twin", "held"), [("refused", THROUGH, True), (THROUGH, THROUGH, False), ("refused", "it hung", False)]
)
def test_an_attack_is_held_only_beside_a_twin_that_works(attack: str, twin: str, held: bool):
    assert is_held({"attack": attack, "twin": twin}) is held


@pytest.mark.parametrize("said", ["it hung", "NameError: name 'x' is not defined", "ImportError:"])
def test_an_attack_that_hung_or_is_broken_is_not_held(said: str):
    assert not is_held({"attack": said, "twin": THROUGH})


@pytest.mark.parametrize("said", ["OSError: [Errno 1] TypeError: no", "RuntimeError: can't start new thread"])
def test_an_attack_that_was_refused_by_an_error_is_held(said: str):
    assert is_held({"attack": said, "twin": THROUGH})


def test_a_tier_has_its_column_and_leaves_the_others_alone(document: str):
    (kind, row), whole = ("network", table.names()["network"][0]), table.read(document)
    before = whole.marks[kind, row]["bubblewrap"]
    whole.put("qemu", {kind: {row: (False, "it went through")}}, "2026-01-29", "QEMU 1")
    again = table.read(table.written(document, whole))
    assert again.marks[kind, row]["qemu"] == table.THROUGH
    assert again.marks[kind, row]["bubblewrap"] == before
    assert {again.marks[other]["qemu"] for other in again.marks if other != (kind, row)} == {table.NOT_PLAYED}
    assert again.played["qemu"] == ("2026-01-29", "QEMU 1")


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
