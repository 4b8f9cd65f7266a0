"""Runs every attack and its legitimate control inside a sandbox, each in a separate process.

A control that is shared by several attacks runs once, after the last of these attacks.

Usage: python3 sandbox_attack_runner.py ATTACKS RESULTS CONCURRENCY SECONDS.

ATTACKS is JSON, `{prelude, attacks: [{name, attack, control, hold_seconds}]}`; RESULTS gets `{name: {attack: report,
control: report}}`. A report is `{outcome, by, output}`, and after a success also has `held`: the start and end of the
time during which the effects were kept. The outcome is

- `succeeded`: the code called `succeeded()`;
- `refused`: it called `refused(*words)`, raised an OSError, or was killed; `by` has the words, the errno or the signal;
- `hung`: it did not end within SECONDS;
- `error`: it raised another exception, or failed within `setup()`;
- `silent`: none of these.

`output` has what the code printed, for diagnosis only. The report of a hung process also has `step`: the state of the
process and, innermost first, the lines that it was executing.
"""

import contextlib
import errno
import faulthandler
import json
import os
import pathlib
import re
import select
import signal
import ssl
import sys
import time

POLL_SECONDS = 0.05
STEP_SIGNAL, STEP_SECONDS = signal.SIGUSR1, 5.0
"""The signal that asks a process for its current step, and how long to wait for the answer."""

_FRAME = re.compile(rb'File "(attack|prelude)", line (\d+) in (.+)')


class SetupFailedError(Exception):
    """The preparation of an attack failed."""


@contextlib.contextmanager
def setup():
    """Wrap the preparation of an attack. An error during the preparation is a defect of the attack, not a denial."""
    try:
        yield
    except OSError as error:
        raise SetupFailedError(repr(error)) from error


class Reports:
    """Functions with which attack code reports its outcome. fd: a pipe to the parent process."""

    def __init__(self, fd):
        self._fd = fd
        self.has_succeeded = False

    def report_success(self):
        self.has_succeeded = True
        self._write({"outcome": "succeeded"})

    def report_refusal(self, *words):
        self._write({"outcome": "refused", "by": list(words)})

    def report_error(self, error):
        self._write({"outcome": "error", "by": [f"{type(error).__qualname__}: {error}"[:300]]})

    def report_hold(self, begin, end):
        self._write({"outcome": "held", "held": [begin, end]})

    def try_calls(self, *calls):
        """Try each call. Report `succeeded` if one of them succeeds, otherwise `refused` with all errors."""
        words = set()
        for call in calls:
            try:
                call()
            except OSError as error:
                words.add(error_word(error))
            else:
                self.report_success()
                return
        self.report_refusal(*sorted(words))

    def _write(self, report):
        os.write(self._fd, json.dumps(report).encode() + b"\n")


def error_word(error):
    """Return the word that the report uses for an OSError."""
    if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        return "closed"
    if isinstance(error, TimeoutError) and error.errno is None:
        return "timeout"
    return errno.errorcode.get(error.errno, type(error).__qualname__)


class AttackProcess:
    """Runs code in a fork of this process, with all modules imported, since imports take seconds in a microVM.

    attacks: names of the attacks that the code belongs to; kind: whether it is the attack or the control;
    prelude_globals: the global variables that the prelude has set, which the code uses.
    """

    def __init__(self, attacks, kind, code, hold_seconds, prelude_globals, seconds):
        self.attacks, self.kind, self._code = attacks, kind, code
        self.deadline = time.monotonic() + seconds
        self.received, self.open_fds = {}, set()
        output, output_write = os.pipe()
        report_fd, report_write = os.pipe()
        step_fd, step_write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            for fd in (output, report_fd, step_fd):
                os.close(fd)
            run(code, prelude_globals, output_write, report_write, step_write, hold_seconds)
        for fd in (output_write, report_write, step_write):
            os.close(fd)
        for fd in (output, report_fd, step_fd):
            os.set_blocking(fd, False)
            self.received[fd] = b""
            self.open_fds.add(fd)
        self.output_fd, self.report_fd, self._step_fd = output, report_fd, step_fd

    def read(self):
        """Read the available data."""
        for fd in tuple(self.open_fds):
            with contextlib.suppress(BlockingIOError):
                while data := os.read(fd, 65536):
                    self.received[fd] += data
                self.open_fds.remove(fd)

    def poll_report(self):
        """Return the report once the process has ended or timed out."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        hung = time.monotonic() > self.deadline
        self.read()
        if not pid and not hung:
            return None
        # Later reports do not count, because the signal can interrupt a call for which the code waits.
        report_lines, step = self.received[self.report_fd], {} if pid else {"step": self._find_step()}
        with contextlib.suppress(OSError):
            os.killpg(self.pid, signal.SIGKILL)
        if not pid:
            os.waitpid(self.pid, 0)
        for fd in self.received:
            os.close(fd)
        output = self.received[self.output_fd].decode(errors="replace").strip()[-300:]
        report = combine_reports(report_lines, status, hung=hung and not pid)
        return {**report, "output": output, **(step if report["outcome"] == "hung" else {})}

    def _find_step(self):
        """Return the state of the process and the lines that it is executing, innermost first."""
        step = [read_process_state(self.pid)]
        with contextlib.suppress(OSError):
            os.kill(self.pid, STEP_SIGNAL)
        ends_at, answer, length = time.monotonic() + STEP_SECONDS, b"", -1
        while len(answer) != length and time.monotonic() < ends_at:
            length = len(answer) or -1  # the answer may arrive in parts
            time.sleep(POLL_SECONDS)
            self.read()
            answer = self.received[self._step_fd]
        lines = self._code.splitlines()
        for source, number, function in _FRAME.findall(answer):
            text = lines[int(number) - 1].strip() if source == b"attack" else ""
            step.append(f"{source.decode()}, line {int(number)} in {function.decode()}: {text}"[:200])
        return step if len(step) > 1 else [*step, f"no answer within {STEP_SECONDS:.0f} s"]


def read_process_state(pid):
    """Return the state of a process, its CPU time in clock ticks and the kernel function that it waits in."""
    words = []
    with contextlib.suppress(OSError, IndexError):
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        words += [f"state {fields[0]}", f"user {fields[11]}", f"system {fields[12]}"]
    with contextlib.suppress(OSError):
        words.append(f"in {pathlib.Path(f'/proc/{pid}/wchan').read_text()}")
    return ", ".join(words)


def combine_reports(report_lines, status, *, hung):
    """Combine all reports: success takes precedence, then a defect of the attack, then a denial."""
    reports = [json.loads(line) for line in report_lines.splitlines()]
    held = [report["held"] for report in reports if report["outcome"] == "held"]
    reports = [report for report in reports if report["outcome"] != "held"]
    if hung:
        reports.append({"outcome": "hung"})
    if os.WIFSIGNALED(status):
        reports.append({"outcome": "refused", "by": [signal.Signals(os.WTERMSIG(status)).name]})
    for outcome in ("succeeded", "hung", "error"):
        for report in reports:
            if report["outcome"] == outcome:
                return {"by": [], **report, **({"held": held[0]} if held else {})}
    words = sorted({word for report in reports for word in report["by"]})
    return {"outcome": "refused" if reports else "silent", "by": words}


def run(source, prelude_globals, output, report_fd, step_fd, hold_seconds):
    """Run the code in the child process; never returns."""
    os.setsid()
    for target in (1, 2):
        os.dup2(output, target)
    os.close(output)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout.reconfigure(line_buffering=True)  # a process that is killed does not flush its output
    # A thread that writes the step would prevent some attacks, which only a process with one thread can try.
    faulthandler.register(STEP_SIGNAL, step_fd, all_threads=False)
    reports = Reports(report_fd)
    prelude_globals.update(
        setup=setup, succeeded=reports.report_success, refused=reports.report_refusal, try_calls=reports.try_calls
    )
    own_pid = os.getpid()
    try:
        exec(compile(source, "attack", "exec"), prelude_globals)
    except SystemExit:
        pass
    except OSError as error:
        print(repr(error))
        reports.report_refusal(error_word(error))
    except BaseException as error:
        reports.report_error(error)
    finally:
        if reports.has_succeeded and os.getpid() == own_pid:
            # The effects of the attack are kept, so that the host can take a sample.
            begin = time.time()
            time.sleep(hold_seconds)
            reports.report_hold(begin, time.time())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def schedule(attacks):
    """Yield the code to run, as (names of attacks, kind, code, seconds to hold)."""
    names_by_control = {}
    for attack in attacks:
        names_by_control.setdefault(attack["control"], []).append(attack["name"])
    for attack in attacks:
        control = (names_by_control[attack["control"]], "control", attack["control"], 0)
        is_shared = len(control[0]) > 1
        if not is_shared:
            yield control
        yield [attack["name"]], "attack", attack["attack"], attack["hold_seconds"]
        if is_shared and control[0][-1] == attack["name"]:
            yield control


def save(results, path):
    """Save the results so far, because an attack may kill all processes of the sandbox."""
    part = pathlib.Path(path + ".part")
    part.write_text(json.dumps(results, indent=1))
    part.replace(path)


def main():
    attacks, path, concurrency, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    configuration = json.loads(pathlib.Path(attacks).read_text())
    pending = list(schedule(configuration["attacks"]))
    prelude_globals = {"__name__": "attack"}
    exec(compile(configuration["prelude"], "prelude", "exec"), prelude_globals)
    results, running = {}, []
    while pending or running:
        while pending and len(running) < concurrency:
            running.append(AttackProcess(*pending.pop(0), prelude_globals, seconds))
        select.select([fd for attack in running for fd in attack.open_fds], [], [], POLL_SECONDS)
        for attack in list(running):
            report = attack.poll_report()
            if report is not None:
                running.remove(attack)
                for name in attack.attacks:
                    results.setdefault(name, {})[attack.kind] = report
        if not running:
            save(results, path)
    print(len(results), "attacks run")


if __name__ == "__main__":
    main()
