"""Runs the command `sandbox` in a fork of a process that has imported all modules, instead of a new interpreter.

As with a new interpreter, a separate process runs `main()` with arguments, environment, time zone, directory, new
streams (so terminals are detected), signals and exit code; exit handlers run; an uncaught exception prints a traceback,
SIGINT ends the process, the exit code is 120 if the last output cannot be written, and PYTHONWARNINGS can turn warnings
into errors.

Differences: missing or slow imports, and imports that emit warnings, are not detected; the process is a child of the
fork server and has its user, limits, namespaces, control group, umask and hash seed; the encoding is UTF-8; modules are
not cleared at exit; /proc/PID/environ and cmdline are the fork server's. Tests that depend on any of these start
`python -m sandbox`.
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

CLI_MAIN = "sandbox.cli.main:main"
_PROGRAM = "import sys; sys.path.append(sys.argv[1]); from doubles.command_fork_server import serve; serve()"


class ForkedCommand(subprocess.Popen):
    """Like `subprocess.Popen(("sandbox", *arguments), …)` with `env`, `cwd` and stream options.

    main: entry point of another program of Sandbox, as `module:function`.
    """

    def __init__(self, arguments, *, main=CLI_MAIN, **keywords):
        self._main = main
        super().__init__(("sandbox", *map(os.fsdecode, arguments)), **keywords)

    def _execute_child(self, args, _executable, _preexec_fn, _close_fds, _pass_fds, cwd, env, *rest):
        pipes = rest[3:9]  # pairs of the child's and the parent's descriptors
        streams = [
            number if descriptor == -1 else descriptor
            for number, descriptor in enumerate((pipes[0], pipes[3], pipes[5]))
        ]
        request = {
            "main": self._main, "arguments": args[1:], "cwd": os.fspath(cwd or Path.cwd()), "env": _environment(env),
            "has_session": rest[-2],
        }  # fmt: skip
        self._channel, child_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with child_end:
            socket.send_fds(_server(), [json.dumps(request).encode()], [*streams, child_end.fileno()])
        self._close_pipe_fds(*pipes)
        self.pid = int(self._channel.recv(16))
        self._child_created = True

    def _internal_poll(self, *_, **__):
        if self.returncode is None and select.select([self._channel], [], [], 0)[0]:
            self._handle_exitstatus(int(self._channel.recv(16)))
            self._channel.close()  # the pid has been reserved until now
        return self.returncode

    def _wait(self, timeout):
        if self.returncode is None and not select.select([self._channel], [], [], timeout and max(timeout, 0))[0]:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self._internal_poll()


def run(*arguments, stdin=None, timeout=60, **keywords):
    """Like `subprocess.run(("sandbox", *arguments), input=stdin, capture_output=True, …)`."""
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with ForkedCommand(arguments, **streams, **keywords) as process:
        try:
            output = process.communicate(stdin, timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, *output)


def _environment(env):
    variables = {name: os.fspath(value) for name, value in (os.environ if env is None else env).items()}
    read_at_start = {name for name in variables if name.startswith(("PYTHON", "LC_"))} - {
        "PYTHONWARNINGS",
        "PYTHONPATH",
    }
    assert not read_at_start, f"a fork ignores {read_at_start}"
    assert variables.get("PYTHONWARNINGS", "error") == "error"
    return variables


@cache
def _server():
    parent_end, child_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "PYTHONWARNINGS": "error"}
    with child_end:
        server = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(Path(__file__).parents[1])],
            env=environment, stdin=child_end.fileno(), cwd="/",
        )  # fmt: skip
    atexit.register(lambda: (parent_end.close(), server.wait(20)))
    return parent_end
