"""Runs the tests against mutants and lists those that no test notices; `script/mutate` runs it."""

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

from mutation.mutants import Mutant, mutants_of
from mutation.test_runner import Copy, Outcome, adopt_orphans, end_children, libraries, preload, run_tests

CHECKOUT = Path(__file__).parents[2]
HERE = Path("tests") / "mutation"
SOURCES = Path("src") / "sandbox"
BASELINE_SECONDS = 1800
CPU_SECONDS, CPU_FACTOR = 8, 4
WALL_SECONDS, WALL_FACTOR = 30, 5
"""A mutant that takes longer than these, and as many times longer than its tests take unchanged, loops or hangs."""


def main(arguments: list[str] | None = None, checkout: Path = CHECKOUT) -> int:
    """Exit code 1: the score is below the minimum, or a listed equivalent mutant no longer exists."""
    options = _options(arguments)
    os.nice(10)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(128 + signal.SIGTERM))
    targets = tomllib.loads((checkout / HERE / "targets.toml").read_text())["targets"]
    everything = {file: mutants_of(checkout / SOURCES / file, checkout / SOURCES) for file in targets}
    equivalents, stale = equivalents_of(checkout, everything)
    for key in stale:
        print(f"stale: {key[0]} has no such mutant any more: {key[2]} -> {key[3]} (in {key[1] or 'the module'})")
    chosen = choose(everything, equivalents, options)
    print(f"seed {options.seed}: {len(chosen)} mutants of {sum(map(len, everything.values()))}", flush=True)
    survivors = _play(checkout, targets, chosen, options)
    score = 100 * (1 - len(survivors) / len(chosen)) if chosen else 100.0
    left_out = sum(mutant.key in equivalents for one in everything.values() for mutant in one)
    print(
        f"\n{len(chosen) - len(survivors)} of {len(chosen)} killed: {score:.1f} % (minimum {options.minimum:g} %);",
        end=" ",
    )
    print(f"{left_out} equivalent ones left out; seed {options.seed}")
    return int(score < options.minimum or bool(stale))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="script/mutate", description="Change the source, and see whether a test fails."
    )
    parser.add_argument("places", nargs="*", metavar="FILE[:LINE]", help="only here, as gateway/egress/policy.py:29")
    parser.add_argument("--sample", type=int, default=400, help="so many mutants, evenly of each file; 0 for all")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--minimum", type=float, default=97.0, help="exit with 1 when fewer percent are killed")
    parser.add_argument("--workers", type=int, default=2)
    return parser.parse_args(arguments)


def equivalents_of(
    checkout: Path, everything: dict[str, list[Mutant]]
) -> tuple[dict[tuple[str, str, str, str, int], str], list[tuple[str, str, str, str, int]]]:
    """The reasons of the mutants that change nothing, by their key, and the keys of those that are not there."""
    listed = tomllib.loads((checkout / HERE / "equivalents.toml").read_text()).get("equivalent", [])
    reasons = {
        (one["file"], one.get("scope", ""), one["original"], one["mutated"], one.get("occurrence", 1)): one["reason"]
        for one in listed
    }
    known = {mutant.key for mutants in everything.values() for mutant in mutants}
    return reasons, [key for key in reasons if key not in known]


def choose(
    everything: dict[str, list[Mutant]],
    equivalents: dict[tuple[str, str, str, str, int], str],
    options: argparse.Namespace,
) -> list[Mutant]:
    """As many of each file as of the others, so that a table does not crowd out decisions."""
    chance = random.Random(options.seed)
    queues = []
    for mutants in everything.values():
        asked = [one for one in mutants if one.key not in equivalents and _is_at(one, options.places)]
        queues.append(chance.sample(asked, len(asked)))
    left, chosen = [queue for queue in queues if queue], []
    while left and (options.sample == 0 or len(chosen) < options.sample):
        for queue in left:
            chosen.append(queue.pop())
        left = [queue for queue in left if queue]
    return chosen[: options.sample or None]


def _is_at(mutant: Mutant, places: list[str]) -> bool:
    return not places or any(
        mutant.file == file and (not line or mutant.line <= int(line) <= mutant.last_line)
        for file, _, line in (place.partition(":") for place in places)
    )


def _play(
    checkout: Path, targets: dict[str, list[str]], chosen: list[Mutant], options: argparse.Namespace
) -> list[Mutant]:
    adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="mutate-") as directory:
        workers = [Worker(checkout, Path(directory) / str(number), options.seed) for number in range(options.workers)]
        try:
            return _play_on(workers, checkout, targets, chosen)
        finally:
            for worker in workers:
                worker.process.kill()
            end_children()


def _play_on(
    workers: list["Worker"], checkout: Path, targets: dict[str, list[str]], chosen: list[Mutant]
) -> list[Mutant]:
    used = {mutant.file: targets[mutant.file] for mutant in chosen}
    files = test_files(checkout, used)
    for number, worker in enumerate(workers):
        worker.ask(("baseline", files, files[number :: len(workers)], sorted(used)))
    baseline = Baseline()
    for worker in workers:
        baseline.add(worker.answer())
    print(f"{len(baseline.seconds)} tests pass unchanged in {sum(baseline.seconds.values()):.0f} s", flush=True)
    waiting = [(mutant, baseline.tests_for(mutant, used[mutant.file])) for mutant in reversed(chosen)]
    return _judge(workers, waiting, baseline)


def _judge(workers: list["Worker"], waiting: list[tuple[Mutant, list[str]]], baseline: "Baseline") -> list[Mutant]:
    survivors, began, total, done = [], time.monotonic(), len(waiting), 0
    under_way: dict[connection.Connection, tuple[Worker, Mutant]] = {}
    free = list(workers)
    while waiting or under_way:
        while free and waiting:
            mutant, tests = waiting.pop()
            worker = free.pop()
            worker.ask(("mutant", mutant, tests, sum(baseline.seconds[test] for test in tests)))
            under_way[worker.pipe] = worker, mutant
        for pipe in connection.wait(list(under_way)):
            worker, mutant = under_way.pop(pipe)
            outcome = worker.answer()
            free.append(worker)
            done += 1
            if not outcome.failed:
                survivors.append(mutant)
                _show(mutant, len(outcome.seconds))
            if done % 50 == 0 or done == total:
                seconds = time.monotonic() - began
                print(f"{done} of {total} in {seconds:.0f} s: {len(survivors)} survived", flush=True)
    return survivors


def _show(mutant: Mutant, test_count: int) -> None:
    place = f"{mutant.file}:{mutant.line} in {mutant.scope or 'the module'}"
    print(f"\nsurvived {test_count} tests: {place} ({mutant.operator}, occurrence {mutant.occurrence})")
    print(f"  - {mutant.original}\n  + {mutant.mutated}", flush=True)


def test_files(checkout: Path, targets: dict[str, list[str]]) -> list[str]:
    """The named files, and those in the named directories."""
    found = set()
    for place in {place for places in targets.values() for place in places}:
        path = checkout / "tests" / place
        if not path.exists():
            raise SystemExit(f"targets.toml names tests/{place}, which is not there")
        found |= {path} if path.is_file() else set(path.rglob("test_*.py"))
    return sorted(str(path.relative_to(checkout)) for path in found)


class Baseline:
    """What the tests do with the unchanged source: how long each takes, and which of them run a line."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._tests: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        self._imported: set[tuple[str, int]] = set()

    def add(self, outcome: Outcome) -> None:
        """Of a part of the tests."""
        if outcome.failed:
            raise SystemExit(f"The tests do not pass with the unchanged source: {outcome.failed}")
        self.seconds |= outcome.seconds
        for file, lines in outcome.lines.items():
            for line, tests in lines.items():
                self._tests[file][line] |= set(tests) - {""}
                if "" in tests:
                    self._imported.add((file, line))

    def tests_for(self, mutant: Mutant, places: list[str]) -> list[str]:
        """The fastest first of those that run its lines; then the others of their files, which may share a fixture.

        All of the target's, where the code runs at import, of its module or of one with tests.
        """
        lines = self._tests[mutant.file]
        asked = range(mutant.line, mutant.last_line + 1)
        is_imported = mutant.is_imported or any((mutant.file, line) in self._imported for line in asked)
        running = set().union(*(tests for line, tests in lines.items() if mutant.is_imported or line in asked))
        others = {test.split("::")[0] for test in running}
        paths = tuple(f"tests/{place}" for place in places)
        own = [test for test in self.seconds if test.startswith(paths)]
        rest = [test for test in own if is_imported or test.split("::")[0] in others]
        chosen = {test for test in own if test in running}, set(rest) - running
        return [test for tests in chosen for test in sorted(tests, key=lambda test: (self.seconds[test], test))]


class Worker:
    """A process with a copy of the checkout. `ask` and `answer` take turns."""

    def __init__(self, checkout: Path, directory: Path, seed: int) -> None:
        self.pipe, theirs = get_context("fork").Pipe()
        self.process = get_context("fork").Process(target=_serve, args=(checkout, directory, seed, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, question: tuple[object, ...]) -> None:
        """Begin."""
        self.pipe.send(question)

    def answer(self) -> Outcome:
        """Wait for the end."""
        try:
            return self.pipe.recv()
        except EOFError:
            raise SystemExit("A worker ended.") from None


def _serve(checkout: Path, directory: Path, seed: int, pipe: connection.Connection) -> None:
    copy = Copy(checkout, directory)
    copy.enter()
    while True:
        match pipe.recv():
            case "baseline", files, own, measured:
                pipe.send(_baseline(copy, files, own, measured, seed))
            case "mutant", mutant, tests, seconds:
                pipe.send(_try(copy, mutant, tests, seconds, seed))


def _baseline(copy: Copy, files: list[str], own: list[str], measured: list[str], seed: int) -> Outcome:
    found = copy.run(lambda: libraries(files, copy.root), wall_seconds=BASELINE_SECONDS, cpu_seconds=BASELINE_SECONDS)
    if found.failed:
        return found
    preload(found.modules)
    paths = {str(copy.root / SOURCES / file): file for file in measured}
    outcome = copy.run(
        lambda: run_tests(own, None, seed, list(map(Path, paths))) if own else Outcome(),
        wall_seconds=BASELINE_SECONDS,
        cpu_seconds=BASELINE_SECONDS,
    )
    outcome.lines = {paths[path]: lines for path, lines in outcome.lines.items()}
    # What is compiled now is what all mutants share.
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    return outcome


def _try(copy: Copy, mutant: Mutant, tests: list[str], seconds: float, seed: int) -> Outcome:
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
