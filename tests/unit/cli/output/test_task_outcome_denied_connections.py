"""The command that allows the hosts of refused connections."""

import pytest

from sandbox.cli.output.task_outcome import ALLOWED_HOSTS_MAX, DeniedConnection, allow_command

NOT_LISTED_REASON = "vm.allowed_hosts does not list it."


@pytest.mark.parametrize(
    ("vm", "refused", "options"),
    [
        ({}, [("a.org", 443, NOT_LISTED_REASON)], "--set vm.network_mode=outbound --set 'vm.allowed_hosts[0]=a.org'"),
        (
            {"network_mode": "outbound", "allowed_hosts": ["x.org"]},
            [("a.org", 8443, NOT_LISTED_REASON), ("a.org", 443, NOT_LISTED_REASON), ("a.org", 80, NOT_LISTED_REASON)],
            "--set 'vm.allowed_hosts[1]=a.org:8443' --set 'vm.allowed_hosts[2]=a.org'",
        ),
        ({"network_mode": "full"}, [("10.0.0.1", 80, "it is not a public address.")], ""),
        ({}, [("*.org", 443, NOT_LISTED_REASON), ("a b", 443, NOT_LISTED_REASON)], ""),
        ({}, [], ""),
    ],
)
def test_command_allows_the_refused_hosts_that_a_manifest_can_allow(vm, refused, options):
    task = {"id": "fix-42", "definition": {"vm": vm}}
    command = allow_command(task, [DeniedConnection(*each) for each in refused])
    assert command == (f"sandbox task rerun fix-42 {options}" if options else "")


def test_command_that_allows_hosts_is_bounded():
    refused = [DeniedConnection(f"host-{number}.org", 443, NOT_LISTED_REASON) for number in range(1000)]
    command = allow_command({"id": "a", "definition": {}}, refused)
    assert command.count("vm.allowed_hosts[") == ALLOWED_HOSTS_MAX
