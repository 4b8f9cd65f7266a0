"""sandbox_attack_runner.py derives the outcome from the attack code's calls and errors, never from its output."""

import json
import signal
import subprocess
import sys
import time

import pytest

from escape import sandbox_attack_runner

ATTACK_TIMEOUT_SECONDS, HOLD_SECONDS = 2, 1.5
PRELUDE = "import os, signal, socket, ssl, sys, threading, time"


@pytest.fixture
def run_attacks(tmp_path):
    def run(*codes):
        attacks = [{"name": code, "attack": code, "control": "succeeded()", "hold_seconds": 0} for code in codes]
        configuration, results = tmp_path / "attacks.json", tmp_path / "results.json"
        configuration.write_text(json.dumps({"prelude": PRELUDE, "attacks": attacks}))
        command = [
            sys.executable,
            sandbox_attack_runner.__file__,
            str(configuration),
            str(results),
            "2",
            str(ATTACK_TIMEOUT_SECONDS),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=60, cwd=tmp_path)
        reports = json.loads(results.read_text())
        assert {report["control"]["outcome"] for report in reports.values()} == {"succeeded"}
        return [reports[code]["attack"] for code in codes]

    return run


@pytest.mark.parametrize(
    ("code", "outcome", "words"),
    [
        ("succeeded()", "succeeded", []),
        ("t = threading.Thread(target=succeeded); t.start(); t.join()", "succeeded", []),
        ("if os.fork() == 0: succeeded()\nelse: os.wait()", "succeeded", []),
        ("succeeded(); 1 / 0", "succeeded", []),
        ("succeeded(); refused('EPERM')", "succeeded", []),
        ("refused('EPERM'); succeeded()", "succeeded", []),
        ("succeeded(); os.kill(os.getpid(), 9)", "succeeded", []),
        ("try_calls(lambda: open('/no/such'), lambda: 1)", "succeeded", []),
        ("try_calls(lambda: open('/no/such'), lambda: os.listdir('/dev/null'))", "refused", ["ENOENT", "ENOTDIR"]),
        ("try_calls()", "refused", []),
        ("open('/no/such')", "refused", ["ENOENT"]),
        ("refused('limit')", "refused", ["limit"]),
        ("refused()", "refused", []),
        ("raise socket.timeout()", "refused", ["timeout"]),
        ("raise ssl.SSLEOFError(8, 'closed')", "refused", ["closed"]),
        ("os.kill(os.getpid(), 9)", "refused", ["SIGKILL"]),
        ("os.kill(os.getpid(), 11)", "refused", ["SIGSEGV"]),
        ("refused('EPERM'); open('/no/such')", "refused", ["ENOENT", "EPERM"]),
        ("print('THROUGH')", "silent", []),
        ("print('EPERM: Operation not permitted', flush=True)", "silent", []),
        ('os.write(1, b\'{"outcome": "refused", "by": ["EPERM"]}\')', "silent", []),
        ("pass", "silent", []),
        ("sys.exit(0)", "silent", []),
        ("no_such_name", "error", ["NameError: name 'no_such_name' is not defined"]),
        ("raise RuntimeError('Operation not permitted')", "error", ["RuntimeError: Operation not permitted"]),
        ("refused('EPERM'); no_such_name", "error", ["NameError: name 'no_such_name' is not defined"]),
        ("try_calls(lambda: no_such_name)", "error", ["NameError: name 'no_such_name' is not defined"]),
        ("def defective(:", "error", ["SyntaxError: invalid syntax (attack, line 1)"]),
        ("with setup(): raise OSError(2, 'gone')", "error", ["SetupFailedError: FileNotFoundError(2, 'gone')"]),
        ("with setup(): pass\nraise OSError(1, 'no')", "refused", ["EPERM"]),
        ("time.sleep(60)", "hung", []),
        ("refused('EPERM'); time.sleep(60)", "hung", []),
        ("os.close(1); os.close(2); time.sleep(60)", "hung", []),
    ],
)
def test_report_depends_on_calls_and_errors_of_the_code(run_attacks, code, outcome, words):
    (report,) = run_attacks(code)
    assert (report["outcome"], report["by"]) == (outcome, words), report


def test_remaining_child_process_does_not_block_other_attacks(run_attacks):
    first, second = run_attacks("if os.fork() == 0: time.sleep(50)\nrefused('EPERM')", "succeeded()")
    assert (first["outcome"], second["outcome"]) == ("refused", "succeeded")


@pytest.mark.parametrize(("code", "is_held"), [("succeeded()", True), ("refused('EPERM')", False)])
def test_effects_of_a_successful_attack_are_kept_for_the_hold_time(code, is_held):
    attack_process = sandbox_attack_runner.AttackProcess(["an attack"], "attack", code, HOLD_SECONDS, {}, 30)
    started_at = time.monotonic()
    while (report := attack_process.poll_report()) is None:
        time.sleep(0.01)
    assert (time.monotonic() - started_at >= HOLD_SECONDS) is is_held
    assert ("held" in report) is is_held
    if is_held:
        begin, end = report["held"]
        assert end - begin >= HOLD_SECONDS


def test_report_has_no_hold_time_if_the_attack_is_killed_during_it():
    code = "signal.signal(signal.SIGALRM, signal.SIG_DFL); succeeded(); signal.setitimer(signal.ITIMER_REAL, 0.5)"
    attack_process = sandbox_attack_runner.AttackProcess(
        ["an attack"], "attack", code, HOLD_SECONDS, {"signal": signal}, 30
    )
    while (report := attack_process.poll_report()) is None:
        time.sleep(0.01)
    assert report["outcome"] == "succeeded"
    assert "held" not in report


def test_report_of_a_hung_attack_has_its_output_and_step(run_attacks):
    code = "print('first part')\ndef wait():\n    time.sleep(60)\nwait()"
    (report,) = run_attacks(code)
    assert report["output"] == "first part"
    state, *lines = report["step"]
    assert state.startswith("state S")
    assert lines == ["attack, line 3 in wait: time.sleep(60)", "attack, line 4 in <module>: wait()"]


def test_report_of_a_hung_attack_tells_that_its_step_is_unknown(run_attacks):
    (report,) = run_attacks("signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1]); time.sleep(60)")
    assert report["outcome"] == "hung"
    assert report["step"][1:] == ["no answer within 5 s"]


def test_interrupted_call_of_a_hung_attack_does_not_count_as_success(run_attacks):
    code = "import ctypes\nctypes.CDLL(None).pause()\nsucceeded()"
    (report,) = run_attacks(code)
    assert report["outcome"] == "hung"
    assert report["step"][1] == "attack, line 2 in <module>: ctypes.CDLL(None).pause()"


def test_report_of_an_attack_that_ends_has_no_step(run_attacks):
    (report,) = run_attacks("print('done'); refused('EPERM')")
    assert "step" not in report
