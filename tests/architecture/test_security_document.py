"""docs/security.md shows the declared outcome of each attack. An outcome that no test proved is never written."""

import re
from pathlib import Path

import pytest

from escape import results_table
from escape.attack import OWN_KERNEL, Outcome
from escape.attack_run import ATTACKS
from escape.attack_verdict import Verdict
from escape.attacks_on_collection import NO_EXECUTION, NOT_DELIVERED, OUT_OF_PATCH, RENAMED, SKIPPED, TRAPS
from escape.run_verdicts import CollectedOutput

ATTACKS_MIN = {"network": 30, "credentials": 12, "collection": 15, "resources": 10}


@pytest.fixture
def document(root: Path) -> str:
    return (root / "docs" / "security.md").read_text()


def test_table_lists_exactly_the_attacks(document: str):
    expected = [(kind, row) for kind, rows in results_table.row_names().items() for row in rows]
    assert list(results_table.parse(document).outcomes) == expected, "run script/escape-battery"


def test_no_attack_escapes_from_its_sandbox(document: str):
    outcomes = results_table.parse(document).outcomes
    assert [
        (row, runtime_tier)
        for row, row_outcomes in outcomes.items()
        for runtime_tier in row_outcomes
        if row_outcomes[runtime_tier] == Outcome.ESCAPED
    ] == []


def test_each_cell_is_the_declared_outcome(document: str):
    outcomes = results_table.parse(document).outcomes
    declared = {
        ((kind, attack.name), runtime_tier): attack.expected_outcome(runtime_tier)
        for kind, attacks in ATTACKS.items()
        for attack in attacks
        for runtime_tier in results_table.RUNTIMES
    }
    assert [
        (row, runtime_tier, outcome)
        for row, row_outcomes in outcomes.items()
        for runtime_tier, outcome in row_outcomes.items()
        if outcome not in {declared.get((row, runtime_tier), Outcome.REQUIREMENT_MET), results_table.NOT_RUN}
    ] == [], "run script/escape-battery"


def test_each_attack_ran_on_at_least_one_runtime(document: str):
    outcomes = results_table.parse(document).outcomes
    assert [
        row for row, row_outcomes in outcomes.items() if not set(results_table.PASSED) & set(row_outcomes.values())
    ] == []


def test_each_outcome_is_explained(document: str):
    explained = document.partition("## Tested attacks")[2].partition("<!-- generated")[0]
    assert [
        outcome for outcome in (*results_table.PASSED, Outcome.ESCAPED) if f"| `{outcome}` |" not in explained
    ] == []


def test_only_runtimes_with_their_own_kernel_allow_the_outcome_inside():
    inside = {
        runtime_tier for attacks in ATTACKS.values() for attack in attacks for runtime_tier in attack.allowed_inside
    }
    assert inside == set(OWN_KERNEL)


def test_each_category_has_enough_attacks():
    names = results_table.row_names()
    assert all(len(names[kind]) == len(set(names[kind])) >= minimum for kind, minimum in ATTACKS_MIN.items())


def test_table_is_unchanged_since_it_was_generated(document: str):
    assert results_table.replace_table(document, results_table.parse(document)) == document, "run script/escape-battery"


def test_links_on_the_security_page_are_valid(root: Path, document: str):
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", document)
    assert len(targets) >= 10
    assert [target for target in targets if not (root / "docs" / target).exists()] == []


def declared_verdicts(runtime: str) -> dict[str, dict[str, Verdict]]:
    """Return the declared verdicts of each row."""
    declared = {
        kind: {attack.name: Verdict(attack.expected_outcome(runtime), "") for attack in ATTACKS[kind]}
        for kind in ATTACKS
    }
    traps = {trap.name: Verdict(Outcome.REQUIREMENT_MET, "") for trap in TRAPS}
    return {
        **declared,
        "collection": traps,
        "outside": {row: Verdict(Outcome.REQUIREMENT_MET, "") for row in results_table.HOST_OBSERVATIONS},
    }


def test_writing_a_column_does_not_change_the_other_columns(document: str):
    (kind, row), parsed_table = ("network", results_table.row_names()["network"][0]), results_table.parse(document)
    before = {row_key: outcomes["bubblewrap"] for row_key, outcomes in parsed_table.outcomes.items()}
    verdicts = declared_verdicts("qemu")
    verdicts[kind][row] = Verdict(Outcome.ESCAPED, "it succeeded")
    parsed_table.put("qemu", verdicts, "2026-01-29", "QEMU 1")
    reread = results_table.parse(results_table.replace_table(document, parsed_table))
    assert reread.outcomes[kind, row]["qemu"] == Outcome.ESCAPED
    assert {row_key: outcomes["bubblewrap"] for row_key, outcomes in reread.outcomes.items()} == before
    assert {outcomes["qemu"] for row_key, outcomes in reread.outcomes.items() if row_key != (kind, row)} == set(
        results_table.PASSED
    )
    assert reread.runs["qemu"] == ("2026-01-29", "QEMU 1")


def test_column_is_added_for_a_new_runtime(document: str, monkeypatch: pytest.MonkeyPatch):
    before = results_table.parse(document)
    monkeypatch.setattr(results_table, "RUNTIMES", (*results_table.RUNTIMES, "new"))
    reread = results_table.parse(results_table.replace_table(document, results_table.parse(document)))
    assert {outcomes.pop("new") for outcomes in reread.outcomes.values()} == {results_table.NOT_RUN}
    assert (reread.outcomes, reread.runs) == (before.outcomes, before.runs)


@pytest.mark.parametrize("kind", [*ATTACKS, "collection", "outside"])
@pytest.mark.parametrize("verdict", [None, Verdict(Outcome.UNPROVEN, "it only printed")])
def test_column_with_an_unproven_row_is_not_written(document: str, kind: str, verdict: Verdict | None):
    verdicts, parsed_table = declared_verdicts("qemu"), results_table.parse(document)
    row = next(iter(verdicts[kind]))
    if verdict is None:
        del verdicts[kind][row]
    else:
        verdicts[kind][row] = verdict
    with pytest.raises(results_table.UnprovenError, match=re.escape(row)):
        parsed_table.put("qemu", verdicts, "2026-01-29", "QEMU 1")
    assert results_table.replace_table(document, parsed_table) == document


GOOD_PATCH = b"diff --git a/README.md b/README.md\n+changed\n"
TRAPS_BY_REQUIREMENT = {trap.requirement: trap for trap in reversed(TRAPS)}

PATCH_HEADER = f"# left out: {TRAPS_BY_REQUIREMENT[OUT_OF_PATCH].checked_text}\n".encode()


def collected(
    patch: bytes = GOOD_PATCH, *, paths: tuple[str, ...] = (), message: str = "", has_executed: bool = False
) -> CollectedOutput:
    return CollectedOutput(patch, [(path, path) for path in ("out/plain.txt", *paths)], [message], has_executed)


@pytest.mark.parametrize(
    ("requirement", "good", "bad"),
    [
        (NO_EXECUTION, collected(), collected(has_executed=True)),
        (NO_EXECUTION, collected(), collected(b"")),
        (
            SKIPPED,
            collected(message=f"{TRAPS_BY_REQUIREMENT[SKIPPED].checked_text}: it is not a regular file"),
            collected(
                message=f"{TRAPS_BY_REQUIREMENT[SKIPPED].checked_text}: it is not a regular file",
                paths=(TRAPS_BY_REQUIREMENT[SKIPPED].checked_text,),
            ),
        ),
        (SKIPPED, collected(message=TRAPS_BY_REQUIREMENT[SKIPPED].checked_text), collected()),
        (OUT_OF_PATCH, collected(PATCH_HEADER + GOOD_PATCH), collected()),
        (OUT_OF_PATCH, collected(PATCH_HEADER + GOOD_PATCH), collected(PATCH_HEADER + GOOD_PATCH + PATCH_HEADER)),
        (NOT_DELIVERED, collected(), collected(paths=(TRAPS_BY_REQUIREMENT[NOT_DELIVERED].checked_text,))),
        (
            RENAMED,
            collected(paths=(TRAPS_BY_REQUIREMENT[RENAMED].checked_text,)),
            collected(paths=(TRAPS_BY_REQUIREMENT[RENAMED].checked_text, "out/\x1b[2J")),
        ),
        (RENAMED, collected(paths=(TRAPS_BY_REQUIREMENT[RENAMED].checked_text,)), collected()),
    ],
)
def test_trap_passes_only_if_the_host_met_the_requirement(
    requirement: str, good: CollectedOutput, bad: CollectedOutput
):
    assert good.passes(TRAPS_BY_REQUIREMENT[requirement])
    assert not bad.passes(TRAPS_BY_REQUIREMENT[requirement])
