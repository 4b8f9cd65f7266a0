"""The OCI configuration and the arguments that are passed to runsc."""

import json
from pathlib import Path

import pytest

from sandbox.interfaces.runtime import Command, SandboxSpec
from sandbox.model.failure import AttemptError
from sandbox.runtimes.gvisor.command_lines import encode_config, encode_process, exposed_entries
from sandbox.runtimes.gvisor.runtime import RunscState, is_lost_peer_error, last_error, read_state

PROGRAM = Path("/data/tool")
SPEC = SandboxSpec("attemptattem", Path("/data/attempt"), 2, 1 << 30, 64, programs={PROGRAM: "/opt/tool"})
COMMAND = Command(["/opt/tool", "-x"], {"NAME": "value"}, "/workspace/below")


def config(command=COMMAND):
    return json.loads(encode_config(SPEC, command))


def test_command_runs_as_uid_1000_without_capabilities():
    process = config()["process"]
    assert (process["user"], process["capabilities"]) == ({"uid": 1000, "gid": 1000}, {})
    assert process["noNewPrivileges"] is True
    assert (process["args"], process["cwd"]) == (["/opt/tool", "-x"], "/workspace/below")
    assert process["env"] == ["PWD=/workspace/below", "NAME=value"]
    limits = {limit["type"]: (limit["soft"], limit["hard"]) for limit in process["rlimits"]}
    assert limits == {"RLIMIT_NPROC": (64, 64), "RLIMIT_CORE": (0, 0), "RLIMIT_NOFILE": (4096, 16384)}


def test_only_work_directories_are_writable_bind_mounts():
    assert config()["root"]["readonly"] is True
    binds = {mount["destination"]: mount for mount in config()["mounts"] if mount["type"] == "bind"}
    assert set(binds) == {"/workspace", "/home/agent", "/tmp"}
    assert all({"rw", "nosuid", "nodev"} <= set(mount["options"]) for mount in binds.values())
    others = {mount["destination"]: mount["type"] for mount in config()["mounts"] if mount["type"] != "bind"}
    assert others == {"/proc": "proc", "/sys": "sysfs", "/dev": "tmpfs", "/dev/shm": "tmpfs"}


def test_no_network_namespace_is_created():
    assert "network" not in {namespace["type"] for namespace in config()["linux"]["namespaces"]}


def test_programs_and_host_directories_are_exposed():
    entries = list(exposed_entries(SPEC))
    assert ("program", "root/opt/tool", str(PROGRAM)) in entries
    assert ("image", "root/usr", "/usr") in entries
    assert "bind" not in {kind for kind, _, _ in entries}
    assert ("link", "bundle/config.json", "/proc/self/fd/100") in entries


def test_image_is_exposed_as_the_root():
    spec = SandboxSpec("attemptattem", Path("/data/attempt"), 2, 1 << 30, 64, image=Path("/images/one"))
    entries = list(exposed_entries(spec))
    kinds = [kind for kind, name, _ in entries if name.startswith("root")]
    assert kinds[:2] == ["image", "memory"]
    assert ("image", "root", "/images/one") in entries
    assert {name for kind, name, _ in entries if kind == "file"} >= {"root/etc/passwd", "root/etc/resolv.conf"}
    assert "root/usr" not in {name for _, name, _ in entries}


@pytest.mark.parametrize("command", [Command(["a\0b"], {}, "/"), Command(["a"], {"NAME": "a\0b"}, "/")])
@pytest.mark.parametrize("encode", [lambda command: encode_config(SPEC, command), encode_process])
def test_nul_characters_are_rejected(command, encode):
    with pytest.raises(AttemptError, match="NUL"):
        encode(command)


def test_exec_process_has_a_terminal_and_the_privileges_of_the_first_process():
    exec_process = json.loads(encode_process(COMMAND))
    assert exec_process.pop("terminal") is True
    assert exec_process.items() <= config()["process"].items()


def test_last_error_of_the_log_is_returned():
    lines = [b'{"msg":"one","level":"error"}', b'{"msg":"two","level":"warning"}', b"no json", b"[]", b'{"msg":"\xff"}']
    assert last_error(b"\n".join(lines)) == "one"
    assert last_error(b"\n".join(lines[1:])) == ""


def test_sandbox_without_a_state_is_not_running():
    assert not read_state(2**22 + 1, "attemptattem").is_running
    assert not RunscState(status="running").is_running


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (
            "starting sandbox: failed to setupFS: creating root file system: input/output error",
            True,
        ),
        ("cannot read client sync file: waiting for sandbox to start: EOF", True),
        ("starting container: write: broken pipe", True),
        ("creating container: cannot create sandbox: no such file or directory", False),
        ("unexpected EOF marker in config: permission denied", False),
        ("it ended without an error message", False),
    ],
)
def test_lost_peer_errors_are_recognized(error, is_lost):
    assert is_lost_peer_error(error) is is_lost
