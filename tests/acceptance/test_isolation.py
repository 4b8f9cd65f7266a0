"""What an agent cannot reach from inside its sandbox, and beside each, what it legitimately can."""

import contextlib
import json
import secrets
from pathlib import Path

import pytest

from doubles.blocked_internet import INTERNET_ADDRESS, METADATA_ADDRESS, PRIVATE_ADDRESS, PUBLIC_ADDRESS, ClosedInternet
from doubles.leftovers import SANDBOX_UIDS, process_outside, processes
from doubles.live_server import World, make_repository, python, says, until

SERVER_KEY = f"sk-ant-of-this-server-alone-{secrets.token_hex(8)}"
PROBE = r"""
import json, os, pathlib, socket, subprocess, sys

told = {}

def attempt(name, call):
    try:
        told[name] = call()
    except BaseException as error:
        told[name] = f"{type(error).__name__}: {error}"

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
told["processes"] = sorted(set(processes.values()))
told["secrets"] = secrets_seen
status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
told["capabilities"] = {name: status[name].strip() for name in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb")}
told["no new privileges"], told["seccomp"] = status["NoNewPrivs"].strip(), status["Seccomp"].strip()

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

attempt("twin: commit", can_commit)
attempt("twin: tmp", lambda: can_write("/tmp"))
attempt("twin: home", lambda: can_write(os.environ["HOME"]))
attempt("twin: read etc", lambda: "agent" in pathlib.Path("/etc/passwd").read_text())
attempt("twin: gateway listens", lambda: connect("127.0.0.1", 8123))
attempt("twin: own processes", lambda: os.kill(os.getppid(), 0))

def own_server():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return connect("127.0.0.1", server.getsockname()[1])

attempt("twin: loopback", own_server)
told["identity"] = [os.getuid(), os.getgid(), os.environ["HOME"], os.getcwd()]
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def inside(tmp_path_factory):
    """What an agent saw that tried everything; the server lived in a namespace with a played internet."""
    directory = tmp_path_factory.mktemp("isolation")
    canary = directory / "canary.txt"
    canary.write_text("the host's own")
    with ClosedInternet() as internet:
        world = World(
            directory, prefix=internet.server_prefix, address=INTERNET_ADDRESS, namespace=internet.server_namespace
        )
        try:
            make_repository(world.repositories / "repo.git", {"README.md": "# Hi\n"})
            world.start_git(prefix=internet.internet_prefix)
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
            with process_outside() as outsider:
                yield play(world, internet, canary, targets, outsider)
        finally:
            world.close()


def play(world, internet, canary, targets, outsider):
    settings = {
        "TARGETS": targets,
        "CANARY": str(canary),
        "DATA_DIR": str(world.data_dir),
        "NEEDLE": SERVER_KEY,
        "SERVER_PID": outsider.pid,
    }
    header = "".join(f"{name} = {value!r}\n" for name, value in settings.items())
    world.start_model(python(header + PROBE), says(), prefix=internet.internet_prefix)
    model_port = int(world.model_url.rpartition(":")[2])
    reachable = internet.reach(INTERNET_ADDRESS, model_port)
    until(lambda: ("tcp", INTERNET_ADDRESS, model_port) in internet.packets, what="the packet to be written down")
    before = len(internet.packets)
    world.start_server(ANTHROPIC_API_KEY=SERVER_KEY)
    world.submit()
    world.until_state("running")
    holders = processes_with(SERVER_KEY)
    kernel_uids = until(lambda: set(uids_of("claude", world.data_dir)), what="the agent")
    status = world.wait()
    assert status["state"] == "completed", world.tell()
    answer = world.tool_results()[0]
    assert answer.startswith("{"), answer
    told = json.loads(answer)
    ports = {int(process.said["url"].rpartition(":")[2]) for process in world.processes if "url" in process.said}
    return {
        "told": told,
        "sent": set(internet.packets[before:]),
        "allowed": {("tcp", INTERNET_ADDRESS, port) for port in ports},
        "reachable": reachable,
        "holders": holders,
        "kernel uids": kernel_uids,
        "world": world,
    }


def uids_of(name, data_dir):
    """Kernel uids of what runs by this name for the server's tasks."""
    for pid, _ in processes(data_dir):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            if status.split(maxsplit=2)[1] == name:
                yield int(status.partition("Uid:")[2].split()[1])


def processes_with(needle):
    """Processes of the machine that have it in their environment or argument list."""
    found = set()
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            with contextlib.suppress(OSError):
                for part in ("environ", "cmdline"):
                    if needle.encode() in (directory / part).read_bytes():
                        found.add(int(directory.name))
    return found


def test_not_a_packet_left_for_anything_but_the_model_and_the_git_host(inside):
    assert inside["reachable"]
    assert inside["sent"]
    assert inside["sent"] <= inside["allowed"]


def test_no_connection_is_made_to_anything_but_the_gateway(inside):
    for name, answer in inside["told"].items():
        if name.startswith(("tcp ", "udp ")):
            assert "unreachable" in answer or "refused" in answer, (name, answer)
    assert inside["told"]["proxy"] in ("000", "403")
    assert "PermissionError" in inside["told"]["raw socket"]
    assert "Error" in inside["told"]["packet socket"]
    assert inside["told"]["twin: gateway listens"] == "connected"
    assert inside["told"]["twin: loopback"] == "connected"


def test_no_name_is_resolved(inside):
    answers = {name: answer for name, answer in inside["told"].items() if name.startswith("resolve ")}
    assert len(answers) == 3
    assert all("gaierror" in answer for answer in answers.values()), answers


def test_no_file_of_the_host_is_there(inside):
    told = inside["told"]
    for name in ("canary", "shadow", "root home", "host server", "sys"):
        assert "Error" in str(told[name]), (name, told[name])
    for name in ("write usr", "write etc"):
        assert "Read-only" in told[name] or "PermissionError" in told[name]
    assert told["twin: read etc"] is True
    assert (told["twin: tmp"], told["twin: home"]) == ("x", "x")


def test_no_process_of_the_host_is_there(inside):
    assert set(inside["told"]["processes"]) <= {"bwrap", "claude", "bash", "sh", "python3", "base64", "git"}
    assert "ProcessLookupError" in inside["told"]["kill outside"]
    assert inside["told"]["twin: own processes"] is None


def test_no_key_of_the_server_is_in_any_environment_argument_list_or_file(inside):
    assert inside["told"]["secrets"] == []
    assert SERVER_KEY in {r["headers"].get("x-api-key") for r in inside["world"].model_requests()}


def test_no_privilege_is_left(inside):
    told = inside["told"]
    assert {int(value, 16) for value in told["capabilities"].values()} == {0}
    assert (told["no new privileges"], told["seccomp"]) == ("1", "2")
    assert inside["kernel uids"]
    assert inside["kernel uids"] <= set(SANDBOX_UIDS)
    assert "Error" in told["core pattern"]
    assert told["setuid"] is not None
    assert told["mount"] != 0
    assert told["unshare"] != 0
    assert told["identity"] == [1000, 1000, "/home/agent", "/workspace"]
    assert told["twin: commit"] == "inside"


def test_what_was_refused_is_told(inside):
    events = [json.loads(line.partition("[EVENT] ")[2]) for line in inside["world"].logs(stream="events").splitlines()]
    assert [event for event in events if event["type"] == "egress_denied"]
    metadata = json.loads(inside["world"].artifact("metadata.json"))
    assert metadata["refusals"]


def test_on_the_host_only_the_server_itself_was_given_the_key(inside):
    """Neither the runner nor anything that it starts has it in its environment or argument list."""
    assert inside["holders"] == {inside["world"].server.pid}
