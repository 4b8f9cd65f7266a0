"""The process that `forked_commands` forks: it imports Sandbox once, and each fork runs one of Sandbox's programs."""

import atexit
import gc
import io
import json
import os
import pkgutil
import select
import signal
import socket
import sys
import threading
import time
import warnings
from contextlib import suppress
from importlib import import_module

MESSAGE_BYTES_MAX = 100_000
LAZY_IMPORTS_TO_PRELOAD = (
    "httpx2",
    "httpcore2",
    "certifi",
    "encodings.idna",
    "anyio._backends._asyncio",
    "concurrent.futures.thread",
)
MODULES_NOT_IMPORTED = {"namespace_exec", "runsc_exec"}


def serve():
    """Serve fork requests until the control socket is closed."""
    _import_all()
    control, poll, handlers = socket.socket(fileno=0), select.poll(), {}

    def watch(descriptor, handler):
        handlers[descriptor] = handler
        poll.register(descriptor, select.POLLIN)

    def forget(descriptor):
        poll.unregister(descriptor)
        os.close(descriptor)

    def fork_program():
        message, descriptors, *_ = socket.recv_fds(control, MESSAGE_BYTES_MAX, 4)
        if not message:
            os._exit(0)
        *streams, channel = descriptors
        pid = os.fork()
        if pid == 0:
            control.detach()
            _run_program(json.loads(message), streams)
        for stream in streams:
            os.close(stream)
        _send(channel, pid)
        pidfd = os.pidfd_open(pid)
        watch(pidfd, lambda: report_exit(pidfd, channel))

    def report_exit(pidfd, channel):
        status = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)  # reserves the pid until the parent has read it
        forget(pidfd)
        _send(channel, status.si_status << 8 if status.si_code == os.CLD_EXITED else status.si_status)
        watch(channel, lambda: (forget(channel), os.waitpid(status.si_pid, 0)))

    watch(0, fork_program)
    while True:
        for descriptor, _ in poll.poll():
            handlers[descriptor]()


def _import_all():
    """Import all modules of Sandbox. Like Sandbox's `main()`, do not import the command-line module of httpx2."""
    sys.modules["httpx2._main"] = None
    gc.disable()
    for module in pkgutil.walk_packages(import_module("sandbox").__path__, "sandbox."):
        if module.name.rpartition(".")[2] not in {"__main__", *MODULES_NOT_IMPORTED}:
            import_module(module.name)
    for name in LAZY_IMPORTS_TO_PRELOAD:
        import_module(name)
    _warm_caches()
    gc.freeze()
    gc.enable()


def _warm_caches():
    """Fill the caches of routes, schemas and pages, whose content does not change later."""
    from sandbox.agents import registered_agents
    from sandbox.api.app import create_api_schema_app
    from sandbox.bootstrap.settings import load
    from sandbox.dashboard import templates
    from sandbox.model.manifest import parser

    create_api_schema_app("0", registered_agents())
    load.validate({}, {})
    with suppress(parser.InvalidManifestError):
        parser.parse_manifest(b"{}", agents=registered_agents(), is_json=True)
    pages = templates._environment()
    for name in pages.list_templates():
        pages.get_template(name)


def _send(channel, number):
    with suppress(BrokenPipeError):  # the parent no longer reads
        os.write(channel, str(number).encode())


def _run_program(request, streams):
    """Set up the forked process as a new program, run it and exit."""
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        if request["has_session"]:
            os.setsid()
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        time.tzset()
        if "PYTHONWARNINGS" not in request["env"]:
            _reset_warnings()
        sys.path.pop()
        sys.path[:0] = filter(None, request["env"].get("PYTHONPATH", "").split(os.pathsep))
        sys.argv = ["sandbox", *request["arguments"]]
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            setattr(sys, name, _stream(number, getattr(sys, name)))
            setattr(sys, f"__{name}__", getattr(sys, name))
        os._exit(_run_to_exit(request["main"]))
    finally:
        os._exit(70)


def _reset_warnings():
    """Restore the interpreter's default warning filters."""
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)


def _stream(number, old):
    """Create a standard stream in the same way as the interpreter."""
    mode = "w" if number else "r"
    buffer = os.fdopen(number, mode + "b", closefd=False)
    buffer.raw.name = old.name
    is_line_buffered = number == 2 or buffer.isatty()
    stream = io.TextIOWrapper(buffer, old.encoding, old.errors, newline="\n", line_buffering=is_line_buffered)
    stream.mode = mode
    return stream


def _run_to_exit(main):
    """Run the program and return the interpreter's exit code. If the program is interrupted, end it with SIGINT."""
    code = _exit_code_of(main)
    threading._shutdown()
    atexit._run_exitfuncs()
    gc.collect()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            with suppress(OSError):
                print(f"Exception ignored in: {stream!r}\n{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            code = 120
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return code & 0xFF


def _exit_code_of(main):
    module, _, name = main.partition(":")
    try:
        getattr(import_module(module), name)()
    except SystemExit as exit_:
        if exit_.code is None or isinstance(exit_.code, int):
            return exit_.code or 0
        print(exit_.code, file=sys.stderr)
        return 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0
