"""`sandbox …` as a fork of a process that has imported everything already, in place of a new interpreter.

The same as with a true start: a process of its own that runs `main()` with arguments, environment, time zone,
directory, streams (made anew, so that a terminal is one), signals, exit code; what is run at an interpreter's end; the
traceback of what nobody caught, the end by SIGINT, 120 when the last output cannot be written; warnings as errors, if
PYTHONWARNINGS says so.

Not the same: all is imported, so that an import which is missing, slow or warns is not seen; the process is a child of
one beside the tests, whose user, limits, namespaces, control group, umask and seed of hashes it has; the encoding is
UTF-8; modules are not taken down at the end; its /proc/PID/environ and cmdline are the fork server's. Who asks for any
of these starts `python -m sandbox`.
"""

import atexit
import json
import os
import select
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

COMMAND_LINE = "sandbox.cli.main:main"
_PROGRAM = "import sys; sys.path.append(sys.argv[1]); from doubles.fork_server import serve; serve()"


class ForkedCommand(subprocess.Popen):
    """As `subprocess.Popen(("sandbox", *arguments), …)` with `env`, `cwd` and what says how to speak to it.

    main: where another program of the product begins, as `module:function`.
    """

    def __init__(self, arguments, *, main=COMMAND_LINE, **keywords):
        self._main = main
        super().__init__(("sandbox", *map(os.fsdecode, arguments)), **keywords)

    def _execute_child(self, args, _executable, _preexec_fn, _close_fds, _pass_fds, cwd, env, *rest):
        pipes = rest[3:9]  # a pair each: where the child reads or writes, and what is ours of it
        streams = [number if given == -1 else given for number, given in enumerate((pipes[0], pipes[3], pipes[5]))]
        asked = {
            "main": self._main, "arguments": args[1:], "cwd": os.fspath(cwd or Path.cwd()), "env": _environment(env),
            "has_session": rest[-2],
        }  # fmt: skip
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(_server(), [json.dumps(asked).encode()], [*streams, theirs.fileno()])
        self._close_pipe_fds(*pipes)
        self.pid = int(self._line.recv(16))
        self._child_created = True

    def _internal_poll(self, *_, **__):
        if self.returncode is None and select.select([self._line], [], [], 0)[0]:
            self._handle_exitstatus(int(self._line.recv(16)))
            self._line.close()  # until now the number was this process's
        return self.returncode

    def _wait(self, timeout):
        if self.returncode is None and not select.select([self._line], [], [], timeout and max(timeout, 0))[0]:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self._internal_poll()


def run(*arguments, stdin=None, timeout=60, **keywords):
    """As `subprocess.run(("sandbox", *arguments), input=stdin, capture_output=True, …)`."""
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with ForkedCommand(arguments, **streams, **keywords) as process:
        try:
            written = process.communicate(stdin, timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, *written)


def _environment(env):
    wanted = {name: os.fspath(value) for name, value in (os.environ if env is None else env).items()}
    read_at_start = {name for name in wanted if name.startswith(("PYTHON", "LC_"))} - {"PYTHONWARNINGS", "PYTHONPATH"}
    assert not read_at_start, f"a fork is too late for {read_at_start}"
    assert wanted.get("PYTHONWARNINGS", "error") == "error"
    return wanted


@cache
def _server():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "PYTHONWARNINGS": "error"}
    with theirs:
        server = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(Path(__file__).parents[1])],
            env=environment, stdin=theirs.fileno(), cwd="/",
        )  # fmt: skip
    atexit.register(lambda: (ours.close(), server.wait(20)))
    return ours
