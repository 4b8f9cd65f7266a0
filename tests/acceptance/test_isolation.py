"""An agent's attempts to access things outside its sandbox, each paired with a legitimate access that must work."""

import contextlib
import json
import secrets
from pathlib import Path

import pytest

from doubles.deployment import Deployment, make_repository, python_turn, reply_turn, wait_until
from doubles.fake_internet import (
    INTERNET_ADDRESS,
    METADATA_ADDRESS,
    PRIVATE_ADDRESS,
    PUBLIC_ADDRESS,
    FakeInternet,
)
from doubles.leftovers import SANDBOX_UIDS, host_process, processes

SERVER_KEY = f"sk-ant-of-this-server-alone-{secrets.token_hex(8)}"
ACCESS_CHECKS = r"""
import json, os, pathlib, socket, subprocess, sys

results = {}

def attempt(name, call):
    try:
        results[name] = call()
    except BaseException as error:
        results[name] = f"{type(error).__name__}: {error}"

def connect(address, port, kind=socket.SOCK_STREAM):
    with socket.socket(socket.AF_INET, kind) as s:
        s.settimeout(3)
        s.connect((address, port))
        if kind == socket.SOCK_DGRAM:
            s.send(b"hello")
            return s.recv(100).decode()
        return "connected"

for name, address, port in TARGETS:
    attempt(f"tcp {name}", lambda: connect(address, port))
    attempt(f"udp {name}", lambda: connect(address, port, socket.SOCK_DGRAM))
for host in ("example.org", "api.anthropic.com", "localhost.localdomain"):
    attempt(f"resolve {host}", lambda: socket.gethostbyname(host))
attempt("raw socket", lambda: str(socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)))
attempt("packet socket", lambda: str(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)))
attempt("proxy", lambda: subprocess.run(["curl", "-sS", "-m", "5", "-o", "/dev/null", "-w", "%{http_code}",
    "-x", "http://127.0.0.1:3128", "https://example.org/"], capture_output=True, text=True).stdout)
attempt("plain http", lambda: subprocess.run(["curl", "-sS", "-m", "5", "--noproxy", "*", "http://198.18.0.9/"],
    capture_output=True, text=True).returncode)
attempt("canary", lambda: pathlib.Path(CANARY).read_text())
attempt("shadow", lambda: pathlib.Path("/etc/shadow").read_text())
attempt("root home", lambda: os.listdir("/root"))
attempt("host server", lambda: os.listdir(DATA_DIR))
attempt("write usr", lambda: pathlib.Path("/usr/canary").write_text("x"))
attempt("write etc", lambda: pathlib.Path("/etc/canary").write_text("x"))
attempt("core pattern", lambda: str(os.open("/proc/sys/kernel/core_pattern", os.O_WRONLY)))
attempt("sys", lambda: os.listdir("/sys"))
attempt("setuid", lambda: os.setuid(0))
attempt("mount", lambda: subprocess.run(["mount", "-t", "tmpfs", "none", "/tmp"], capture_output=True).returncode)
attempt("unshare", lambda: subprocess.run(["unshare", "-U", "true"], capture_output=True).returncode)
attempt("kill outside", lambda: os.kill(SERVER_PID, 0))
processes = {}
secrets_seen = []
for directory in pathlib.Path("/proc").iterdir():
    if directory.name.isdigit():
        try:
            processes[directory.name] = (directory / "comm").read_text().strip()
        except OSError:
            pass
        for part in ("environ", "cmdline"):
            try:
                if NEEDLE.encode() in (directory / part).read_bytes():
                    secrets_seen.append(f"{directory}/{part}")
            except OSError:
                pass
needle = NEEDLE.encode()
for top in ("/etc", "/home", "/run", "/tmp", "/var", "/workspace", "/dev/shm"):
    for directory, _, names in os.walk(top):
        for name in names:
            path = pathlib.Path(directory, name)
            try:
                if path.is_file() and needle in path.read_bytes():
                    secrets_seen.append(str(path))
            except OSError:
                pass
results["processes"] = sorted(set(processes.values()))
results["secrets"] = secrets_seen
status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
results["capabilities"] = {name: status[name].strip() for name in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb")}
results["no new privileges"], results["seccomp"] = status["NoNewPrivs"].strip(), status["Seccomp"].strip()

def can_commit():
    pathlib.Path("/workspace/new.txt").write_text("new")
    for command in (["git", "add", "new.txt"], ["git", "commit", "-qm", "inside"]):
        subprocess.run(command, cwd="/workspace", check=True, capture_output=True)
    log = subprocess.run(["git", "log", "-1", "--format=%s"], cwd="/workspace", capture_output=True, text=True)
    return log.stdout.strip()

def can_write(directory):
    path = pathlib.Path(directory, "written")
    path.write_text("x")
    return path.read_text()

attempt("control: commit", can_commit)
attempt("control: tmp", lambda: can_write("/tmp"))
attempt("control: home", lambda: can_write(os.environ["HOME"]))
attempt("control: read etc", lambda: "agent" in pathlib.Path("/etc/passwd").read_text())
attempt("control: gateway listens", lambda: connect("127.0.0.1", 8123))
attempt("control: own processes", lambda: os.kill(os.getppid(), 0))

def own_server():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return connect("127.0.0.1", server.getsockname()[1])

attempt("control: loopback", own_server)
results["identity"] = [os.getuid(), os.getgid(), os.environ["HOME"], os.getcwd()]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of the access checks run by an agent; the server runs in a network namespace with a fake internet."""
    directory = tmp_path_factory.mktemp("isolation")
    canary = directory / "canary.txt"
    canary.write_text("the host's own")
    with FakeInternet() as network:
        deployment = Deployment(
            directory,
            command_prefix=network.server_command_prefix,
            address=INTERNET_ADDRESS,
            namespace=network.server_namespace,
        )
        try:
            make_repository(deployment.repositories / "repo.git", {"README.md": "# Hi\n"})
            deployment.start_git(command_prefix=network.internet_command_prefix)
            targets = [
                (name, address, port)
                for name, address in (
                    ("internet", PUBLIC_ADDRESS),
                    ("metadata", METADATA_ADDRESS),
                    ("private", PRIVATE_ADDRESS),
                    ("model host", INTERNET_ADDRESS),
                )
                for port in (80, 53)
            ]
            with host_process() as host_child:
                yield run_access_checks(deployment, network, canary, targets, host_child)
        finally:
            deployment.close()


def run_access_checks(deployment, network, canary, targets, host_child):
    settings = {
        "TARGETS": targets,
        "CANARY": str(canary),
        "DATA_DIR": str(deployment.data_dir),
        "NEEDLE": SERVER_KEY,
        "SERVER_PID": host_child.pid,
    }
    header = "".join(f"{name} = {value!r}\n" for name, value in settings.items())
    deployment.start_model(
        python_turn(header + ACCESS_CHECKS), reply_turn(), command_prefix=network.internet_command_prefix
    )
    model_port = int(deployment.model_url.rpartition(":")[2])
    reachable = network.can_reach(INTERNET_ADDRESS, model_port)
    wait_until(
        lambda: ("tcp", INTERNET_ADDRESS, model_port) in network.packets, description="the packet to be recorded"
    )
    before = len(network.packets)
    deployment.start_server(ANTHROPIC_API_KEY=SERVER_KEY)
    deployment.submit()
    deployment.wait_for_state("running")
    holders = processes_with(SERVER_KEY)
    uids = wait_until(lambda: set(kernel_uids("claude", deployment.data_dir)), description="the agent")
    status = deployment.wait()
    assert status["state"] == "completed", deployment.diagnostics()
    output = deployment.tool_results()[0]
    assert output.startswith("{"), output
    observed = json.loads(output)
    ports = {
        int(process.ready_message["url"].rpartition(":")[2])
        for process in deployment.processes
        if "url" in process.ready_message
    }
    return {
        "observed": observed,
        "sent": set(network.packets[before:]),
        "allowed": {("tcp", INTERNET_ADDRESS, port) for port in ports},
        "reachable": reachable,
        "holders": holders,
        "kernel uids": uids,
        "deployment": deployment,
    }


def kernel_uids(name, data_dir):
    """Yield the kernel uids of the tasks' processes with this name."""
    for pid, _ in processes(data_dir):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            if status.split(maxsplit=2)[1] == name:
                yield int(status.partition("Uid:")[2].split()[1])


def processes_with(needle):
    """Return the pids of all processes on the machine that have the string in their environment or argument list."""
    found = set()
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            with contextlib.suppress(OSError):
                for part in ("environ", "cmdline"):
                    if needle.encode() in (directory / part).read_bytes():
                        found.add(int(directory.name))
    return found


def test_packets_go_only_to_the_model_and_the_git_host(results):
    assert results["reachable"]
    assert results["sent"]
    assert results["sent"] <= results["allowed"]


def test_connections_are_only_made_to_the_gateway(results):
    for name, output in results["observed"].items():
        if name.startswith(("tcp ", "udp ")):
            assert "unreachable" in output or "refused" in output, (name, output)
    assert results["observed"]["proxy"] in ("000", "403")
    assert "PermissionError" in results["observed"]["raw socket"]
    assert "Error" in results["observed"]["packet socket"]
    assert results["observed"]["control: gateway listens"] == "connected"
    assert results["observed"]["control: loopback"] == "connected"


def test_host_names_do_not_resolve(results):
    lookups = {name: output for name, output in results["observed"].items() if name.startswith("resolve ")}
    assert len(lookups) == 3
    assert all("gaierror" in output for output in lookups.values()), lookups


def test_host_files_are_not_visible(results):
    observed = results["observed"]
    for name in ("canary", "shadow", "root home", "host server", "sys"):
        assert "Error" in str(observed[name]), (name, observed[name])
    for name in ("write usr", "write etc"):
        assert "Read-only" in observed[name] or "PermissionError" in observed[name]
    assert observed["control: read etc"] is True
    assert (observed["control: tmp"], observed["control: home"]) == ("x", "x")


def test_host_processes_are_not_visible(results):
    assert set(results["observed"]["processes"]) <= {"bwrap", "claude", "bash", "sh", "python3", "base64", "git"}
    assert "ProcessLookupError" in results["observed"]["kill outside"]
    assert results["observed"]["control: own processes"] is None


def test_server_key_is_not_in_environments_or_arguments_or_files(results):
    assert results["observed"]["secrets"] == []
    assert SERVER_KEY in {r["headers"].get("x-api-key") for r in results["deployment"].model_requests()}


def test_agent_has_no_privileges(results):
    observed = results["observed"]
    assert {int(value, 16) for value in observed["capabilities"].values()} == {0}
    assert (observed["no new privileges"], observed["seccomp"]) == ("1", "2")
    assert results["kernel uids"]
    assert results["kernel uids"] <= set(SANDBOX_UIDS)
    assert "Error" in observed["core pattern"]
    assert observed["setuid"] is not None
    assert observed["mount"] != 0
    assert observed["unshare"] != 0
    assert observed["identity"] == [1000, 1000, "/home/agent", "/workspace"]
    assert observed["control: commit"] == "inside"


def test_denials_are_reported(results):
    events = [
        json.loads(line.partition("[EVENT] ")[2]) for line in results["deployment"].logs(stream="events").splitlines()
    ]
    assert [event for event in events if event["type"] == "egress_denied"]
    metadata = json.loads(results["deployment"].artifact("metadata.json"))
    assert metadata["refusals"]


def test_no_host_process_except_the_server_has_the_key(results):
    """Neither the runner nor its children have the key in their environment or argument list."""
    assert results["holders"] == {results["deployment"].server.pid}
