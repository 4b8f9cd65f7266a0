"""A task's refused connections: their counts, their rows in the output, and the command that allows them."""

from __future__ import annotations

import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from sandbox.cli.output.event_printer import MODEL_HOST
from sandbox.cli.output.formatting import pluralize
from sandbox.cli.output.next_commands import task_id_for_command
from sandbox.cli.output.terminal_text import escape_name
from sandbox.cli.output.text_log_parser import parse_log_events

if TYPE_CHECKING:
    from sandbox.client import Client
    from sandbox.client.response_types import Task


class DeniedConnection(NamedTuple):
    """A connection that the sandbox tried to make and that was refused."""

    host: str
    port: int
    reason: str


ALLOWED_HOSTS_MAX = 10
"""Maximum number of hosts in a command that allows refused hosts."""

_HOST_NAME = re.compile(r"[a-z0-9_][a-z0-9._-]*", re.IGNORECASE)  # a program may also request a wildcard: *.com
_MANIFEST_REASON = re.compile(r"vm\.(allowed_hosts|network_mode)")
_DEFAULT_PORTS = {80, 443}
"""The ports that an allowed host covers if it has no port."""


def allow_command(task: Mapping[str, Any], denied: Iterable[DeniedConnection], *, on_terminal: bool = False) -> str:
    """Return the command that runs the task again with the refused hosts allowed; empty if no host can be allowed."""
    hosts = dict.fromkeys(
        each.host if each.port in _DEFAULT_PORTS else f"{each.host}:{each.port}"
        for each in denied
        if _HOST_NAME.fullmatch(each.host) and _MANIFEST_REASON.match(each.reason)
    )
    if not hosts:
        return ""
    vm = (task.get("definition") or {}).get("vm") or {}
    # A manifest with another mode has no allowed hosts.
    is_outbound = vm.get("network_mode") == "outbound"
    assignments = [] if is_outbound else ["vm.network_mode=outbound"]
    listed = len(vm.get("allowed_hosts") or ()) if is_outbound else 0
    assignments += [
        f"vm.allowed_hosts[{number}]={host}" for number, host in enumerate(islice(hosts, ALLOWED_HOSTS_MAX), listed)
    ]
    options = "".join(f" --set {shlex.quote(assignment)}" for assignment in assignments)
    return f"sandbox task rerun {task_id_for_command(task, on_terminal=on_terminal)}{options}"


def find_denied_connections(client: Client, task: Task) -> tuple[int, Counter[DeniedConnection]]:
    """Return the number of a task's refused connections, and how often each connection occurs in the log.

    The status also counts refused model requests, which are not connections. If the log is unavailable, the
    number includes these requests.
    """
    from sandbox.client import ClientError

    count, denied = task["progress"].get("egress_denied") or 0, Counter[DeniedConnection]()
    if count:
        with suppress(ClientError):
            for event in parse_log_events(client.logs(task["id"], stream="events"), task["id"]):
                if event["type"] != "egress_denied":
                    continue
                if event["host"] == MODEL_HOST:
                    count -= 1
                else:
                    denied[DeniedConnection(event["host"], event["port"], event["reason"])] += 1
    return max(count, 0), denied


_DENIED_HOSTS_MAX = 5


_DENIED_REASONS_MAX = 3


def denied_connection_rows(
    task: Task, count: int, denied: Counter[DeniedConnection], *, on_terminal: bool
) -> Iterator[tuple[str, str]]:
    """Yield the refused hosts for each reason, and the command that allows them."""
    if not count:
        return
    by_reason = defaultdict[str, Counter[str]](Counter)
    for connection, number in denied.items():
        by_reason[connection.reason][f"{connection.host}:{connection.port}"] += number
    others = count
    for reason, hosts in list(by_reason.items())[:_DENIED_REASONS_MAX]:
        others -= hosts.total()
        yield "Refused", f"{_refused_text(hosts)}: {reason}"
    if others > 0:
        shown_id = task_id_for_command(task, on_terminal=on_terminal)
        yield "Refused", f"{pluralize(others, 'connection')}: sandbox task logs {shown_id} --stream events"
    if command := allow_command(task, denied, on_terminal=on_terminal):
        yield "Allow", command


def _refused_text(hosts: Counter[str]) -> str:
    """Return the number of refused connections, and the hosts with the most refused connections."""
    shown = [escape_name(host) for host, _ in hosts.most_common(_DENIED_HOSTS_MAX)]
    more = [f"{len(hosts) - len(shown)} more"] if len(hosts) > len(shown) else []
    return f"{pluralize(hosts.total(), 'connection')} to {', '.join([*shown, *more])}"
