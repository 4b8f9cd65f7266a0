"""The process that `forked_commands` forks: it imports the product once, and each fork lives as one program of it."""

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
IMPORTED_LATE = (
    "httpx",
    "httpcore",
    "certifi",
    "encodings.idna",
    "anyio._backends._asyncio",
    "concurrent.futures.thread",
)
PROGRAMS_OF_SANDBOXES = {"exec_command", "runsc_exec"}


def serve():
    """Of the process that is forked: goes on until nobody can ask any more."""
    _import_all()
    control, poll, handlers = socket.socket(fileno=0), select.poll(), {}

    def expect(descriptor, handler):
        handlers[descriptor] = handler
        poll.register(descriptor, select.POLLIN)

    def done_with(descriptor):
        poll.unregister(descriptor)
        os.close(descriptor)

    def begin():
        message, descriptors, *_ = socket.recv_fds(control, MESSAGE_BYTES_MAX, 4)
        if not message:
            os._exit(0)
        *streams, line = descriptors
        pid = os.fork()
        if pid == 0:
            control.detach()
            _become(json.loads(message), streams)
        for stream in streams:
            os.close(stream)
        _say(line, pid)
        ending = os.pidfd_open(pid)
        expect(ending, lambda: tell_end(ending, line))

    def tell_end(ending, line):
        ended = os.waitid(os.P_PIDFD, ending, os.WEXITED | os.WNOWAIT)  # its number is kept until this is heard
        done_with(ending)
        _say(line, ended.si_status << 8 if ended.si_code == os.CLD_EXITED else ended.si_status)
        expect(line, lambda: (done_with(line), os.waitpid(ended.si_pid, 0)))

    expect(0, begin)
    while True:
        for descriptor, _ in poll.poll():
            handlers[descriptor]()


def _import_all():
    """Of the product. As in `main()`, httpx goes without a command line of its own."""
    sys.modules["httpx._main"] = None
    gc.disable()
    for module in pkgutil.walk_packages(import_module("sandbox").__path__, "sandbox."):
        if module.name.rpartition(".")[2] not in {"__main__", *PROGRAMS_OF_SANDBOXES}:
            import_module(module.name)
    for name in IMPORTED_LATE:
        import_module(name)
    _make_what_is_made_once()
    gc.freeze()
    gc.enable()


def _make_what_is_made_once():
    """By each process, of what it has imported, and only read then: routes, schemas, pages."""
    from sandbox.api.app import create_api_schema_app
    from sandbox.bootstrap.settings import load
    from sandbox.dashboard import templates
    from sandbox.model.manifest import parser

    create_api_schema_app("0")
    load.validate({}, {})
    parser.validate({})
    pages = templates._environment()
    for name in pages.list_templates():
        pages.get_template(name)


def _say(line, number):
    with suppress(BrokenPipeError):  # nobody wants to know any more
        os.write(line, str(number).encode())


def _become(asked, streams):
    """A process that has just begun as a program, and its whole life."""
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        if asked["has_session"]:
            os.setsid()
        os.chdir(asked["cwd"])
        os.environ.clear()
        os.environ.update(asked["env"])
        time.tzset()
        if "PYTHONWARNINGS" not in asked["env"]:
            _overlook_warnings()
        sys.path.pop()
        sys.path[:0] = filter(None, asked["env"].get("PYTHONPATH", "").split(os.pathsep))
        sys.argv = ["sandbox", *asked["arguments"]]
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            setattr(sys, name, _stream(number, getattr(sys, name)))
            setattr(sys, f"__{name}__", getattr(sys, name))
        os._exit(_live(asked["main"]))
    finally:
        os._exit(70)


def _overlook_warnings():
    """As an interpreter does where nobody says otherwise."""
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)


def _stream(number, old):
    """What an interpreter makes of a descriptor."""
    mode = "w" if number else "r"
    buffer = os.fdopen(number, mode + "b", closefd=False)
    buffer.raw.name = old.name
    is_of_lines = number == 2 or buffer.isatty()
    stream = io.TextIOWrapper(buffer, old.encoding, old.errors, newline="\n", line_buffering=is_of_lines)
    stream.mode = mode
    return stream


def _live(main):
    """The exit code that an interpreter would give; an interrupted one ends by the signal."""
    code = _code_of(main)
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


def _code_of(main):
    module, _, name = main.partition(":")
    try:
        getattr(import_module(module), name)()
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0
