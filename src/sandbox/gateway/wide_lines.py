"""How many connections have large buffers in the kernel. No task is charged for them, and all share the machine's."""

from sandbox.gateway.limits import WIDE_CONNECTIONS_MAX
from sandbox.gateway.line import Line


class WideLines:
    """Those of a gateway to hosts, to the model or from inside. A further one gets small buffers for good."""

    def __init__(self) -> None:
        self._wide: list[Line] = []

    def add(self, line: Line) -> None:
        """A new connection."""
        self._wide = [one for one in self._wide if not one.is_gone]
        if len(self._wide) < WIDE_CONNECTIONS_MAX:
            self._wide.append(line)
        else:
            line.narrow()
