"""Runs the attacks with one runtime, on a server in an isolated network that contains targets."""

import contextlib
import fcntl
import itertools
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from doubles import fake_public_host
from doubles.deployment import FINAL_STATES, ORGANIZATION, SERVER_KEY, Deployment, make_repository, reply_turn
from doubles.fake_agent import INIT, RESULT, make_python_fake_agent
from doubles.fake_internet import (
    INTERNET_ADDRESS,
    METADATA_ADDRESS,
    PRIVATE_ADDRESS,
    PUBLIC_ADDRESS,
    SERVER_ADDRESS,
    FakeInternet,
)
from doubles.leftovers import host_process
from doubles.network_namespace import in_namespace
from escape import attacks_on_collection, attacks_on_credentials, attacks_on_network, attacks_on_resources
from escape.attack import OWN_KERNEL, Evidence
from escape.host_watch import HOLD_SECONDS, HostWatch
from sandbox.demo.scripted_model import ToolUse, Turn

HOST, HOST_ADDRESS, SERVER_IP_ADDRESS = "files.example.org", "8.8.4.4", "8.8.4.5"
ADDRESSES_BY_NAME = {
    HOST: HOST_ADDRESS,
    "other.example": HOST_ADDRESS,
    "inside.example": PRIVATE_ADDRESS,
    "metadata.example": METADATA_ADDRESS,
    "own.example": SERVER_IP_ADDRESS,
}
ALLOWED_HOSTS = [HOST, "inside.example", "metadata.example", "own.example"]
TOOL_MILLISECONDS = 600_000
TASK_TIMEOUT_SECONDS = 900
ATTACK_TIMEOUT_SECONDS, ATTACK_TIMEOUT_SECONDS_EMULATED = 90, 180

ATTACKS = {
    "network": tuple(attacks_on_network.network_attacks()),
    "credentials": tuple(attacks_on_credentials.credential_attacks()),
    "resources": tuple(attacks_on_resources.resource_attacks()),
}
_TESTED_ELSEWHERE = {*attacks_on_network.gateway_attack_names(), "more memory than the limit"}
ATTACKS_FOR_EACH_RUNTIME = {
    kind: tuple(attack for attack in attacks if attack.name not in _TESTED_ELSEWHERE)
    for kind, attacks in ATTACKS.items()
}
"""The attacks whose outcome depends on the runtime.

Attacks that reach only the gateway are omitted, because they are tested with another runtime. Attacks that kill the
agent are omitted too: tests/contract tests them with each runtime, and tests/acceptance/test_limit_errors.py with
gVisor.
"""

_PRELUDES = {
    "network": attacks_on_network.PRELUDE,
    "credentials": attacks_on_credentials.PRELUDE,
    "resources": attacks_on_resources.PRELUDE,
}


_MACHINE_LOCK_FILE = Path(tempfile.gettempdir(), "sandbox-escape-load.lock")
"""All runs on the machine lock this file, including runs in other test processes."""


_FAKE_AGENT_SOURCE = f"""
import json, subprocess, sys
session = {{"session_id": sys.argv[sys.argv.index("--session-id") + 1]}}
print(json.dumps({{**{INIT!r}, **session}}), flush=True)
subprocess.run(["sh", "turn-0.sh"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(json.dumps({{**{RESULT!r}, **session}}))
"""


class AttackRun:
    """A context manager that runs the tasks, and then provides the reports and the host observations as attributes.

    user: uid of the server, root by default. Resource attacks need root, since other users cannot enforce limits.
    attacks: keyed by kind; all by default.
    has_fake_agent: use a Python program as the agent, since the real one takes minutes to start in an emulated guest.
    results: the reports, keyed by kind and attack. evidence: the observations with which the reports are judged.
    sent_packets, allowed_packets: the recorded packets, and those that are expected.
    host_requests: the requests that the allowed host received.
    """

    def __init__(self, directory, runtime, *, user=None, attacks=ATTACKS, has_fake_agent=False):
        self.directory, self.runtime, self.user = Path(directory), runtime, user
        self.attacks, self._has_fake_agent = attacks, has_fake_agent
        self._turn_count = 3 if attacks is ATTACKS else 1
        self.results, self.evidence = {}, Evidence({})
        self.marker = f"battery-{secrets.token_hex(6)}"
        self.execution_marker_file, self.canary = self.directory / "executed", self.directory / "canary.txt"
        self.host_request_log = self.directory / "host.ndjson"
        self._exit_stack = ExitStack()

    def __enter__(self):
        self._exit_stack.__enter__()
        try:
            self._prepare()
            self._run()
        except BaseException:
            self._exit_stack.close()
            raise
        return self

    def __exit__(self, *_):
        self._exit_stack.close()

    def _prepare(self):
        self.canary.write_text("the host's own\n")
        network = self.network = self._exit_stack.enter_context(FakeInternet())
        _add_address(network.internet_command_prefix, HOST_ADDRESS)
        _add_address(network.server_command_prefix, SERVER_IP_ADDRESS)
        self.deployment = Deployment(
            self.directory,
            command_prefix=(
                *network.server_command_prefix,
                *self._hosts_file_command_prefix(),
                *self._user_command_prefix(),
            ),
            address=INTERNET_ADDRESS,
            namespace=network.server_namespace,
        )
        self._exit_stack.callback(self.deployment.close)
        self.socket_file = self.directory / "host.sock"
        self.abstract_socket_name = f"sandbox-battery-{os.getpid()}-{self.runtime}"
        with in_namespace(network.server_namespace):
            for name in (str(self.socket_file), f"\0{self.abstract_socket_name}"):
                listener = self._exit_stack.enter_context(socket.socket(socket.AF_UNIX))
                listener.bind(name)
                listener.listen()
        self.socket_file.chmod(0o777)

    def _user_command_prefix(self):
        if self.user is None:
            return ()
        os.chown(self.directory, self.user, self.user)
        return ("setpriv", f"--reuid={self.user}", f"--regid={self.user}", "--clear-groups")

    def _hosts_file_command_prefix(self):
        hosts, resolver = self.directory / "hosts", self.directory / "resolv.conf"
        hosts.write_text(
            "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in ADDRESSES_BY_NAME.items())
        )
        resolver.write_text("nameserver 127.0.0.1\n")  # where no resolver listens
        mounts = f"mount --bind {hosts} /etc/hosts && mount --bind {resolver} /etc/resolv.conf"
        if self.user is not None and sys.base_prefix.startswith("/root/"):
            # Other users cannot access a Python installation in root's home, so mount it into an otherwise empty home.
            python = self.directory / "python"
            python.mkdir()
            mounts += f" && mount --bind {sys.base_prefix} {python} && mount -t tmpfs -o mode=0755 none /root"
            mounts += f" && mkdir -p {sys.base_prefix} && mount --bind {python} {sys.base_prefix}"
        return ("unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh")

    def _run(self):
        deployment, network = self.deployment, self.network
        certificate = self.directory / "host.pem"
        _make_certificate(certificate)
        deployment.start_git(command_prefix=network.internet_command_prefix)
        with (deployment.home / ".gitconfig").open("a") as config:
            config.write("[credential]\n\thelper = store\n")
        turns = [_bash_turn(f"sh turn-{number}.sh") for number in range(self._turn_count)]
        deployment.start_model(*turns, reply_turn(), command_prefix=network.internet_command_prefix)
        program = [
            sys.executable,
            fake_public_host.__file__,
            HOST_ADDRESS,
            str(certificate),
            str(self.host_request_log),
        ]
        deployment._start("host", program, {}, network.internet_command_prefix)
        deployment.start_server(
            SANDBOX_RUNTIME=self.runtime, SSH_AUTH_SOCK=str(self.socket_file), **self._fake_agent_environment()
        )
        self._settings = self._attack_settings()
        public = certificate.read_text().partition("-----BEGIN CERTIFICATE")
        self._files = {"README.md": "# Hi\n", "ca.pem": "".join(public[1:]), **self._sandbox_files()}
        self._make_repository(
            "repo", self._files, *self._sandbox_attack_runner_arguments("network 4", "credentials 3"), ""
        )
        packet_count_before = len(network.packets)
        pids = (deployment.server.ready_message["pid"], self._settings["SERVER_PID"])
        watch = HostWatch(self.marker, pids, deployment.data_dir, has_own_kernel=self.runtime in OWN_KERNEL)
        with watch as self._watch:
            with _machine_lock(is_exclusive=False):
                self._run_network_and_credential_attacks()
            if self.user is None and self.attacks["resources"]:
                with _machine_lock(is_exclusive=self.runtime not in OWN_KERNEL):
                    self._run_resource_attacks()
        self.sent_packets = set(network.packets[packet_count_before:])
        self.evidence = self._collect_evidence()
        ports = {
            int(process.ready_message["url"].rpartition(":")[2])
            for process in deployment.processes
            if "url" in process.ready_message
        }
        services = {("tcp", INTERNET_ADDRESS, port) for port in ports}
        self.allowed_packets = services | {("tcp", HOST_ADDRESS, 80), ("tcp", HOST_ADDRESS, 443)}
        self.host_requests = [json.loads(line) for line in self.host_request_log.read_text().splitlines()]

    def _run_network_and_credential_attacks(self):
        self.status = self._run_task(
            "task-1", ["out/**", "nested/**", ".network.json", ".credentials.json"], ("network", "credentials"),
            vm={"network_mode": "outbound", "allowed_hosts": ALLOWED_HOSTS},
        )  # fmt: skip
        assert self.status["state"] == "completed", self.deployment.diagnostics()

    def _collect_evidence(self):
        """Return the host observations, with addresses replaced by the names of their settings."""
        addresses = {address: name for name, address in self._settings.items() if isinstance(address, str)}
        packets = {(protocol, addresses.get(address, address), port) for protocol, address, port in self.sent_packets}
        return Evidence(
            self._watch.changes(), frozenset(self._missing_host_paths), frozenset(packets), tuple(self._watch.samples)
        )

    def _find_missing_host_paths(self):
        """Return the attacks' paths that do not exist in the server's file system while a sandbox is running."""
        root = f"/proc/{self.deployment.server.ready_message['pid']}/root"
        paths = {path for attacks in self.attacks.values() for attack in attacks for path in attack.host_paths}
        return {path for path in paths if not os.path.lexists(root + self._settings.get(path, path))}

    def _fake_agent_environment(self):
        if not self._has_fake_agent:
            return {}
        return {"PYTHONPATH": str(make_python_fake_agent(self.directory / "agent", "/workspace/agent.py"))}

    def _run_task(self, task_id, patterns, kinds, **sections):
        deployment = self.deployment
        deployment.submit(
            task_id, lifecycle={"artifact_patterns": patterns, "timeout": f"{TASK_TIMEOUT_SECONDS}s"}, **sections
        )
        self._wait_for_agent(task_id)
        status = deployment.wait(task_id, TASK_TIMEOUT_SECONDS)
        for kind in kinds:
            self.results.setdefault(kind, {}).update(json.loads(deployment.artifact(f".{kind}.json", task_id)))
        return status

    def _wait_for_agent(self, task_id):
        """Wait for the agent's first output: a task may be `running` before its sandbox has entered all namespaces."""
        deadline = time.monotonic() + TASK_TIMEOUT_SECONDS
        while (state := self.deployment.status(task_id)["state"]) != "running" or not self._agent_output(task_id):
            is_waiting = state not in FINAL_STATES and time.monotonic() < deadline
            assert is_waiting, f"{state}\n{self.deployment.diagnostics(task_id)}"
            time.sleep(0.05)
        self._watch.mark_sandbox_ready()
        self._missing_host_paths = self._find_missing_host_paths()

    def _agent_output(self, task_id):
        return self.deployment.logs(task_id, "stdout")

    def _run_resource_attacks(self):
        """Run the attacks; after an attack that kills the agent, another task continues with the remaining ones.

        Such an attack counts as refused. The agent can also be killed between two attacks, by the effects of the first
        attack.
        """
        vm = {"memory": f"{attacks_on_resources.MEMORY_MIB}M", "disk": f"{attacks_on_resources.DISK_MIB}M"}
        entries = json.loads(self._files["resources.json"])
        for number in itertools.count(2):
            files = {**self._files, "resources.json": json.dumps(entries)}
            self._make_repository(f"resources-{number}", files, *self._sandbox_attack_runner_arguments("resources 1"))
            repository = {"url": f"{ORGANIZATION}resources-{number}.git"}
            status = self._run_task(f"task-{number}", [".resources.json"], ("resources",), vm=vm, repository=repository)
            if status["state"] == "completed":
                return
            results = self.results["resources"]
            running = [attack for attack in entries["attacks"] if set(results.get(attack["name"], ())) == {"control"}]
            for attack in running:
                code = status["error"]["code"]
                results[attack["name"]]["attack"] = {
                    "outcome": "refused",
                    "by": [code],
                    "output": "its agent was killed",
                }
            remaining = [attack for attack in entries["attacks"] if "attack" not in results.get(attack["name"], {})]
            assert len(remaining) < len(entries["attacks"]), status["error"]
            if not remaining:
                return
            entries["attacks"] = remaining

    def _make_repository(self, name, files, *program_arguments):
        """Create a repository with one script per model turn.

        Empty arguments select the program that creates the traps for collection. A sample of the attacks runs in one
        turn, since a turn is slow in an emulated guest.
        """
        lines = [
            f"python3 sandbox_attack_runner.py {arguments}\n" if arguments else "python3 lay_traps.py\n"
            for arguments in program_arguments
        ]
        scripts = lines if len(lines) <= self._turn_count else ["".join(lines)]
        scripts += ["true\n"] * (self._turn_count - len(scripts))
        programs = {f"turn-{number}.sh": script for number, script in enumerate(scripts)}
        make_repository(self.deployment.repositories / f"{name}.git", {**files, **programs})

    def _sandbox_attack_runner_arguments(self, *kinds_and_concurrencies):
        """Return the arguments of sandbox_attack_runner.py: attacks file, results file, concurrency and seconds."""
        seconds = ATTACK_TIMEOUT_SECONDS_EMULATED if self.runtime == "qemu" else ATTACK_TIMEOUT_SECONDS
        return [
            f"{kind}.json .{kind}.json {concurrency} {seconds}"
            for kind, concurrency in map(str.split, kinds_and_concurrencies)
        ]

    def _attack_settings(self):
        """Return the variables that the attacks' code can use."""
        return {
            "HOST": HOST,
            "PUBLIC": PUBLIC_ADDRESS,
            "METADATA": METADATA_ADDRESS,
            "PRIVATE": PRIVATE_ADDRESS,
            "MODEL_HOST": INTERNET_ADDRESS,
            "MODEL_PORT": int(self.deployment.model_url.rpartition(":")[2]),
            "SERVER": SERVER_ADDRESS,
            "SERVER_PORT": int(self.deployment.server.ready_message["http"].rpartition(":")[2]),
            "SERVER_PID": self._exit_stack.enter_context(host_process()).pid,
            "ABSTRACT": self.abstract_socket_name,
            "SOCKET_FILE": str(self.socket_file),
            "CANARY": str(self.canary),
            "DATA_DIR": str(self.deployment.data_dir),
            "HOST_GIT": str(self.deployment.repositories),
            "EXECUTION_MARKER": str(self.execution_marker_file),
            "CREDENTIALS": str(self.deployment.home / ".gitconfig"),
            "MARKER": self.marker,
            "HAS_OWN_KERNEL": self.runtime in OWN_KERNEL,
        }

    def _sandbox_files(self):
        header = "".join(f"{name} = {value!r}\n" for name, value in self._settings.items())
        # The key is reversed, so that attacks do not find it in their own code.
        header += f"NEEDLE = bytes(reversed({SERVER_KEY[::-1].encode()!r}))\n"
        files = {"sandbox_attack_runner.py": (Path(__file__).parent / "sandbox_attack_runner.py").read_text()}
        for kind, attacks in self.attacks.items():
            entries = [
                {
                    "name": attack.name,
                    "attack": attack.attack,
                    "control": attack.control,
                    "hold_seconds": HOLD_SECONDS if attack.unchanged_observers else 0,
                }
                for attack in attacks
            ]
            files[f"{kind}.json"] = json.dumps({"prelude": header + _PRELUDES[kind], "attacks": entries})
        if self._has_fake_agent:
            files["agent.py"] = _FAKE_AGENT_SOURCE
        return {**files, "lay_traps.py": header + attacks_on_collection.TRAP_SCRIPT}


@contextlib.contextmanager
def _machine_lock(*, is_exclusive):
    """Hold the lock that all runs on the machine share, or hold it exclusively.

    Resource attacks on a shared kernel need the machine exclusively: hundreds of processes are busy, and keep locks of
    other processes. Meanwhile, another run could not observe the host in time.
    """
    deadline = time.monotonic() + TASK_TIMEOUT_SECONDS
    with _MACHINE_LOCK_FILE.open("w") as file:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, (fcntl.LOCK_EX if is_exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                break
            assert time.monotonic() < deadline, f"{_MACHINE_LOCK_FILE} is still locked"
            time.sleep(0.5)
        yield


def _bash_turn(command):
    arguments = {"command": f"{command} 2>&1 | tail -c 2000", "description": "work", "timeout": TOOL_MILLISECONDS}
    return Turn((ToolUse("Bash", arguments),))


def _make_certificate(path):
    subject = ("-subj", f"/CN={HOST}", "-addext", f"subjectAltName=DNS:{HOST}", "-days", "2")
    key = ("-newkey", "rsa:2048", "-nodes", "-keyout", str(path), "-out", str(path) + ".cert")
    subprocess.run(("openssl", "req", "-x509", *key, *subject), check=True, capture_output=True, timeout=60)
    path.write_text(path.read_text() + Path(str(path) + ".cert").read_text())


def _add_address(command_prefix, address):
    command = (*command_prefix, "ip", "address", "add", f"{address}/32", "dev", "lo")
    subprocess.run(command, check=True, capture_output=True, timeout=20)
