"""What the guest's kernel starts: its agent, as one file of compiled code.

An emulated guest would take seconds to find and compile the modules, each by many calls to the host's files.
"""

import marshal
from functools import cache
from pathlib import Path

_DIRECTORY = Path(__file__).parent / "guest"
_MODULES = ("frames", "redirection", "machine", "confinement", "streams", "agent")
"""Each after those that it imports."""

CODE = "/agent"
"""In the guest."""

_START = f"""#!{{interpreter}} -ISE
import marshal, sys
with open({CODE!r}, "rb") as file:
    for name, code in marshal.load(file):
        module = sys.modules[name] = type(sys)(name)
        module.__package__, module.__path__ = "guest", []
        exec(code, module.__dict__)
sys.modules["guest.agent"].main()
"""


def describe_start(interpreter: Path) -> bytes:
    """The script to start, which runs the code."""
    return _START.format(interpreter=interpreter).encode()


@cache
def compile_agent() -> bytes:
    """For the Python that runs here, which is the guest's too."""
    code = [("guest", compile("", "guest", "exec")), *((f"guest.{name}", _compile(name)) for name in _MODULES)]
    return marshal.dumps(code)


def _compile(name: str) -> object:
    source = (_DIRECTORY / f"{name}.py").read_bytes()
    return compile(source, f"guest/{name}.py", "exec", dont_inherit=True, optimize=2)
