"""Runs inside a sandbox: every attack and its legitimate twin, each in a process of its own.

A twin that several attacks have is played once, after the last of them.

Usage: python3 battery.py ATTACKS RESULTS AT_ONCE SECONDS. ATTACKS is JSON, `{prelude, attacks: [{name, attack,
twin, hold_seconds}]}`; RESULTS gets `{name: {attack: report, twin: report}}`. A report is `{outcome, by, said}`,
with `held` the times between which what succeeded stayed done. The outcome is

- `through`: the code called `through()`;
- `refused`: it called `refused(*words)`, raised an OSError, or was killed; `by` has the words, the errno or the signal;
- `hung`: it was not done after SECONDS;
- `broken`: it raised something else, or called `means()` around something that failed;
- `silent`: none of these. What it printed is in `said`, to read, and is never an outcome.
"""

import contextlib
import errno
import json
import os
import pathlib
import select
import signal
import ssl
import sys
import time

PAUSE_SECONDS = 0.05


class MeansFailedError(Exception):
    """What an attack needs before it can begin did not work."""


@contextlib.contextmanager
def means():
    """Around what an attack needs before it begins: a failure there is the attack's own, not a refusal."""
    try:
        yield
    except OSError as error:
        raise MeansFailedError(repr(error)) from error


class Reports:
    """What a piece of code calls to report its outcome; `fd` is a pipe to the battery."""

    def __init__(self, fd):
        self._fd = fd
        self.is_through = False

    def through(self):
        self.is_through = True
        self._write({"outcome": "through"})

    def refused(self, *words):
        self._write({"outcome": "refused", "by": list(words)})

    def broken(self, error):
        self._write({"outcome": "broken", "by": [f"{type(error).__qualname__}: {error}"[:300]]})

    def held(self, begin, end):
        self._write({"outcome": "held", "held": [begin, end]})

    def attempt(self, *calls):
        """Try each; through when one of them works, refused by what all of them met when none does."""
        words = set()
        for call in calls:
            try:
                call()
            except OSError as error:
                words.add(word_of(error))
            else:
                self.through()
                return
        self.refused(*sorted(words))

    def _write(self, report):
        os.write(self._fd, json.dumps(report).encode() + b"\n")


def word_of(error):
    """The word for an OSError in a report."""
    if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        return "closed"
    if isinstance(error, TimeoutError) and error.errno is None:
        return "timeout"
    return errno.errorcode.get(error.errno, type(error).__qualname__)


class Play:
    """One piece of code in a fork of this process, where all that it imports is there: to import it takes seconds in a
    microVM, for each.

    attacks: the names of those that it is the attack or the twin (kind) of · names: what the prelude left, by name.
    """

    def __init__(self, attacks, kind, code, hold_seconds, names, seconds):
        self.attacks, self.kind = attacks, kind
        self.deadline = time.monotonic() + seconds
        self.pipes, self.open = {}, set()
        said, said_inside = os.pipe()
        reported, reported_inside = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(said)
            os.close(reported)
            run(code, names, said_inside, reported_inside, hold_seconds)
        os.close(said_inside)
        os.close(reported_inside)
        for fd in (said, reported):
            os.set_blocking(fd, False)
            self.pipes[fd] = b""
            self.open.add(fd)
        self.said, self.reported = said, reported

    def read(self):
        """What is there."""
        for fd in tuple(self.open):
            with contextlib.suppress(BlockingIOError):
                while data := os.read(fd, 65536):
                    self.pipes[fd] += data
                self.open.remove(fd)

    def ended(self):
        """Its report, once the process has ended or its time is over."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        hung = time.monotonic() > self.deadline
        self.read()
        if not pid and not hung:
            return None
        with contextlib.suppress(OSError):
            os.killpg(self.pid, signal.SIGKILL)
        if not pid:
            os.waitpid(self.pid, 0)
        for fd in self.pipes:
            os.close(fd)
        said = self.pipes[self.said].decode(errors="replace").strip()[-300:]
        return {**report_of(self.pipes[self.reported], status, hung=hung and not pid), "said": said}


def report_of(reported, status, *, hung):
    """One report of all: success counts first, then what is wrong with the attack, then that it was refused."""
    reports = [json.loads(line) for line in reported.splitlines()]
    held = [report["held"] for report in reports if report["outcome"] == "held"]
    reports = [report for report in reports if report["outcome"] != "held"]
    if hung:
        reports.append({"outcome": "hung"})
    if os.WIFSIGNALED(status):
        reports.append({"outcome": "refused", "by": [signal.Signals(os.WTERMSIG(status)).name]})
    for outcome in ("through", "hung", "broken"):
        for report in reports:
            if report["outcome"] == outcome:
                return {"by": [], **report, **({"held": held[0]} if held else {})}
    words = sorted({word for report in reports for word in report["by"]})
    return {"outcome": "refused" if reports else "silent", "by": words}


def run(source, names, said, reported, hold_seconds):
    """In the child; never returns."""
    os.setsid()
    for target in (1, 2):
        os.dup2(said, target)
    os.close(said)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    reports = Reports(reported)
    names.update(means=means, through=reports.through, refused=reports.refused, attempt=reports.attempt)
    own = os.getpid()
    try:
        exec(compile(source, "attack", "exec"), names)
    except SystemExit:
        pass
    except OSError as error:
        print(repr(error))
        reports.refused(word_of(error))
    except BaseException as error:
        reports.broken(error)
    finally:
        if reports.is_through and os.getpid() == own:
            # What it did stays done for as long, so that the host can look.
            begin = time.time()
            time.sleep(hold_seconds)
            reports.held(begin, time.time())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def in_order(attacks):
    """What is played, as (names of attacks, kind, code, seconds to hold)."""
    having = {}
    for one in attacks:
        having.setdefault(one["twin"], []).append(one["name"])
    for one in attacks:
        twin = (having[one["twin"]], "twin", one["twin"], 0)
        is_shared = len(twin[0]) > 1
        if not is_shared:
            yield twin
        yield [one["name"]], "attack", one["attack"], one["hold_seconds"]
        if is_shared and twin[0][-1] == one["name"]:
            yield twin


def keep(results, path):
    """What is known so far: an attack that is played alone may take everything along."""
    part = pathlib.Path(path + ".part")
    part.write_text(json.dumps(results, indent=1))
    part.replace(path)


def main():
    attacks, path, at_once, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    given = json.loads(pathlib.Path(attacks).read_text())
    waiting = list(in_order(given["attacks"]))
    names = {"__name__": "attack"}
    exec(compile(given["prelude"], "prelude", "exec"), names)
    results, playing = {}, []
    while waiting or playing:
        while waiting and len(playing) < at_once:
            playing.append(Play(*waiting.pop(0), names, seconds))
        select.select([fd for one in playing for fd in one.open], [], [], PAUSE_SECONDS)
        for one in list(playing):
            report = one.ended()
            if report is not None:
                playing.remove(one)
                for name in one.attacks:
                    results.setdefault(name, {})[one.kind] = report
        if not playing:
            keep(results, path)
    print(len(results), "attacks played")


if __name__ == "__main__":
    main()
