"""Runs the tests against mutants and lists the survivors; run by `script/mutate`."""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import tomllib
from collections import defaultdict
from multiprocessing import connection, get_context
from pathlib import Path

from mutation.forked_test_runs import (
    CheckoutCopy,
    Outcome,
    adopt_orphans,
    collect_libraries,
    end_children,
    preload,
    run_tests,
)
from mutation.mutants import Mutant, mutants_of

CHECKOUT = Path(__file__).parents[2]
MUTATION_DIRECTORY = Path("tests") / "mutation"
SOURCES = Path("src") / "sandbox"
BASELINE_SECONDS = 1800
CPU_SECONDS, CPU_FACTOR = 8, 4
WALL_SECONDS, WALL_FACTOR = 30, 5
"""A mutant counts as killed if its tests exceed a base time plus a multiple of their usual duration."""


def main(arguments: list[str] | None = None, checkout: Path = CHECKOUT) -> int:
    """Return exit code 1 if the score is below the minimum, or if a listed equivalent mutant no longer exists."""
    options = _options(arguments)
    os.nice(10)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(128 + signal.SIGTERM))
    targets = tomllib.loads((checkout / MUTATION_DIRECTORY / "targets.toml").read_text())["targets"]
    mutants_by_file = {file: mutants_of(checkout / SOURCES / file, checkout / SOURCES) for file in targets}
    equivalents, stale = equivalents_of(checkout, mutants_by_file)
    for key in stale:
        print(f"stale: {key[0]} no longer has the mutant: {key[2]} -> {key[3]} (in {key[1] or 'the module'})")
    selected = select(mutants_by_file, equivalents, options)
    print(f"seed {options.seed}: {len(selected)} mutants of {sum(map(len, mutants_by_file.values()))}", flush=True)
    survivors = _run(checkout, targets, selected, options)
    score = 100 * (1 - len(survivors) / len(selected)) if selected else 100.0
    skipped = sum(mutant.key in equivalents for mutants in mutants_by_file.values() for mutant in mutants)
    print(
        f"\n{len(selected) - len(survivors)} of {len(selected)} killed: {score:.1f} % (minimum {options.minimum:g} %);",
        end=" ",
    )
    print(f"{skipped} equivalent mutants skipped; seed {options.seed}")
    return int(score < options.minimum or bool(stale))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="script/mutate", description="Change the source and check that a test fails.")
    parser.add_argument(
        "locations", nargs="*", metavar="FILE[:LINE]", help="only these locations, such as gateway/egress/policy.py:29"
    )
    parser.add_argument("--sample", type=int, default=400, help="number of mutants, evenly from each file; 0 for all")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--minimum", type=float, default=97.0, help="exit with 1 if fewer percent are killed")
    parser.add_argument("--workers", type=int, default=2)
    return parser.parse_args(arguments)


def equivalents_of(
    checkout: Path, mutants_by_file: dict[str, list[Mutant]]
) -> tuple[dict[tuple[str, str, str, str, int], str], list[tuple[str, str, str, str, int]]]:
    """Return why each listed mutant is equivalent, keyed by mutant, and the listed keys that no longer exist."""
    listed = tomllib.loads((checkout / MUTATION_DIRECTORY / "equivalents.toml").read_text()).get("equivalent", [])
    reasons = {
        (entry["file"], entry.get("scope", ""), entry["original"], entry["mutated"], entry.get("occurrence", 1)): entry[
            "reason"
        ]
        for entry in listed
    }
    known = {mutant.key for mutants in mutants_by_file.values() for mutant in mutants}
    return reasons, [key for key in reasons if key not in known]


def select(
    mutants_by_file: dict[str, list[Mutant]],
    equivalents: dict[tuple[str, str, str, str, int], str],
    options: argparse.Namespace,
) -> list[Mutant]:
    """Select the same number of mutants per file, so that a file with a large table does not dominate."""
    generator = random.Random(options.seed)
    queues = []
    for mutants in mutants_by_file.values():
        candidates = [
            mutant for mutant in mutants if mutant.key not in equivalents and _is_at(mutant, options.locations)
        ]
        queues.append(generator.sample(candidates, len(candidates)))
    remaining, selected = [queue for queue in queues if queue], []
    while remaining and (options.sample == 0 or len(selected) < options.sample):
        for queue in remaining:
            selected.append(queue.pop())
        remaining = [queue for queue in remaining if queue]
    return selected[: options.sample or None]


def _is_at(mutant: Mutant, locations: list[str]) -> bool:
    return not locations or any(
        mutant.file == file and (not line or mutant.line <= int(line) <= mutant.last_line)
        for file, _, line in (location.partition(":") for location in locations)
    )


def _run(
    checkout: Path, targets: dict[str, list[str]], selected: list[Mutant], options: argparse.Namespace
) -> list[Mutant]:
    adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="mutate-") as directory:
        workers = [Worker(checkout, Path(directory) / str(number), options.seed) for number in range(options.workers)]
        try:
            return _run_on(workers, checkout, targets, selected)
        finally:
            for worker in workers:
                worker.process.kill()
            end_children()


def _run_on(
    workers: list["Worker"], checkout: Path, targets: dict[str, list[str]], selected: list[Mutant]
) -> list[Mutant]:
    used = {mutant.file: targets[mutant.file] for mutant in selected}
    files = list_test_files(checkout, used)
    for number, worker in enumerate(workers):
        worker.send(("baseline", files, files[number :: len(workers)], sorted(used)))
    baseline = Baseline()
    for worker in workers:
        baseline.add(worker.receive())
    print(f"{len(baseline.seconds)} tests pass unchanged in {sum(baseline.seconds.values()):.0f} s", flush=True)
    waiting = [(mutant, baseline.tests_for(mutant, used[mutant.file])) for mutant in reversed(selected)]
    return _run_mutants(workers, waiting, baseline)


def _run_mutants(
    workers: list["Worker"], waiting: list[tuple[Mutant, list[str]]], baseline: "Baseline"
) -> list[Mutant]:
    survivors, started, total, done = [], time.monotonic(), len(waiting), 0
    in_progress: dict[connection.Connection, tuple[Worker, Mutant]] = {}
    free = list(workers)
    while waiting or in_progress:
        while free and waiting:
            mutant, tests = waiting.pop()
            worker = free.pop()
            worker.send(("mutant", mutant, tests, sum(baseline.seconds[test] for test in tests)))
            in_progress[worker.pipe] = worker, mutant
        for pipe in connection.wait(list(in_progress)):
            worker, mutant = in_progress.pop(pipe)
            outcome = worker.receive()
            free.append(worker)
            done += 1
            if not outcome.failed:
                survivors.append(mutant)
                _show(mutant, len(outcome.seconds))
            if done % 50 == 0 or done == total:
                seconds = time.monotonic() - started
                print(f"{done} of {total} in {seconds:.0f} s: {len(survivors)} survived", flush=True)
    return survivors


def _show(mutant: Mutant, test_count: int) -> None:
    location = f"{mutant.file}:{mutant.line} in {mutant.scope or 'the module'}"
    print(f"\nsurvived {test_count} tests: {location} ({mutant.operator}, occurrence {mutant.occurrence})")
    print(f"  - {mutant.original}\n  + {mutant.mutated}", flush=True)


def list_test_files(checkout: Path, targets: dict[str, list[str]]) -> list[str]:
    """Return the listed files, and the test files in the listed directories."""
    paths = set()
    for test_path in {test_path for test_paths in targets.values() for test_path in test_paths}:
        path = checkout / "tests" / test_path
        if not path.exists():
            raise SystemExit(f"targets.toml names tests/{test_path}, which does not exist")
        paths |= {path} if path.is_file() else set(path.rglob("test_*.py"))
    return sorted(str(path.relative_to(checkout)) for path in paths)


class Baseline:
    """The results of the tests with the unchanged source: the duration of each test, and the lines that it covers."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._tests: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        self._lines_run_at_import: set[tuple[str, int]] = set()

    def add(self, outcome: Outcome) -> None:
        """Add the outcome of running some of the tests."""
        if outcome.failed:
            raise SystemExit(f"The tests do not pass with the unchanged source: {outcome.failed}")
        self.seconds |= outcome.seconds
        for file, lines in outcome.lines.items():
            for line, tests in lines.items():
                self._tests[file][line] |= set(tests) - {""}
                if "" in tests:
                    self._lines_run_at_import.add((file, line))

    def tests_for(self, mutant: Mutant, test_paths: list[str]) -> list[str]:
        """Return the tests that run the mutant's lines, then the other tests in their files, which may share a fixture.

        Each group is sorted by duration. If the mutated code runs while its module or a test module is imported, the
        second group contains all other tests of the target.
        """
        lines = self._tests[mutant.file]
        mutated_lines = range(mutant.line, mutant.last_line + 1)
        runs_at_import = mutant.runs_at_import or any(
            (mutant.file, line) in self._lines_run_at_import for line in mutated_lines
        )
        covering = set().union(
            *(tests for line, tests in lines.items() if mutant.runs_at_import or line in mutated_lines)
        )
        covering_files = {test.split("::")[0] for test in covering}
        paths = tuple(f"tests/{test_path}" for test_path in test_paths)
        target_tests = [test for test in self.seconds if test.startswith(paths)]
        rest = [test for test in target_tests if runs_at_import or test.split("::")[0] in covering_files]
        selected = {test for test in target_tests if test in covering}, set(rest) - covering
        return [test for tests in selected for test in sorted(tests, key=lambda test: (self.seconds[test], test))]


class Worker:
    """A process with a copy of the checkout. Calls to `send` and `receive` alternate."""

    def __init__(self, checkout: Path, directory: Path, seed: int) -> None:
        self.pipe, child_pipe = get_context("fork").Pipe()
        self.process = get_context("fork").Process(
            target=_serve, args=(checkout, directory, seed, child_pipe), daemon=True
        )
        self.process.start()
        child_pipe.close()

    def send(self, job: tuple[object, ...]) -> None:
        """Start a job."""
        self.pipe.send(job)

    def receive(self) -> Outcome:
        """Wait for the outcome of the job."""
        try:
            return self.pipe.recv()
        except EOFError:
            raise SystemExit("A worker process ended unexpectedly.") from None


def _serve(checkout: Path, directory: Path, seed: int, pipe: connection.Connection) -> None:
    copy = CheckoutCopy(checkout, directory)
    copy.enter()
    while True:
        match pipe.recv():
            case "baseline", files, assigned_files, covered_files:
                pipe.send(_baseline(copy, files, assigned_files, covered_files, seed))
            case "mutant", mutant, tests, seconds:
                pipe.send(_run_mutant(copy, mutant, tests, seconds, seed))


def _baseline(
    copy: CheckoutCopy, files: list[str], assigned_files: list[str], covered_files: list[str], seed: int
) -> Outcome:
    collected = copy.run(
        lambda: collect_libraries(files, copy.root), wall_seconds=BASELINE_SECONDS, cpu_seconds=BASELINE_SECONDS
    )
    if collected.failed:
        return collected
    preload(collected.modules)
    paths = {str(copy.root / SOURCES / file): file for file in covered_files}
    outcome = copy.run(
        lambda: run_tests(assigned_files, None, seed, list(map(Path, paths))) if assigned_files else Outcome(),
        wall_seconds=BASELINE_SECONDS,
        cpu_seconds=BASELINE_SECONDS,
    )
    outcome.lines = {paths[path]: lines for path, lines in outcome.lines.items()}
    # From now on, no bytecode is written: all mutants use the modules compiled so far.
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    return outcome


def _run_mutant(copy: CheckoutCopy, mutant: Mutant, tests: list[str], seconds: float, seed: int) -> Outcome:
    path = copy.root / SOURCES / mutant.file
    original = path.read_bytes()
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
        compiled.unlink()
    try:
        path.write_text(mutant.source)
        files = sorted({test.split("::")[0] for test in tests})
        return copy.run(
            lambda: run_tests(files, tests, seed, []) if tests else Outcome(),
            wall_seconds=WALL_SECONDS + WALL_FACTOR * seconds,
            cpu_seconds=CPU_SECONDS + CPU_FACTOR * seconds,
        )
    finally:
        path.write_bytes(original)


if __name__ == "__main__":
    sys.exit(main())
