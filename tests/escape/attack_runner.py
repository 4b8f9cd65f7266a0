"""A server in a network of the test's own, with everything around it that an agent might want, for one tier."""

import itertools
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from doubles import fake_host
from doubles.blocked_internet import (
    INTERNET_ADDRESS,
    METADATA_ADDRESS,
    PRIVATE_ADDRESS,
    PUBLIC_ADDRESS,
    SERVER_ADDRESS,
    ClosedInternet,
)
from doubles.leftovers import process_outside
from doubles.live_server import ORGANISATION, SERVER_KEY, TERMINAL, World, make_repository, says
from doubles.network_namespace import in_namespace
from doubles.stand_in_agent import INIT, RESULT, make_stand_in_of_python
from escape import attacks_on_collection, attacks_on_credentials, attacks_on_network, attacks_on_resources
from escape.attack import Evidence
from escape.host_watch import HOLD_SECONDS, HostWatch
from sandbox.demo.model_script import ToolUse, Turn

HOST, HOST_ADDRESS, SERVERS_OWN_ADDRESS = "files.example.org", "8.8.4.4", "8.8.4.5"
NAMES = {
    HOST: HOST_ADDRESS,
    "other.example": HOST_ADDRESS,
    "inside.example": PRIVATE_ADDRESS,
    "metadata.example": METADATA_ADDRESS,
    "own.example": SERVERS_OWN_ADDRESS,
}
ALLOWED = [HOST, "inside.example", "metadata.example", "own.example"]
TOOL_MILLISECONDS = 600_000
TASK_SECONDS = 900
PLAY_SECONDS, PLAY_SECONDS_EMULATED = 30, 180

ATTACKS = {
    "network": tuple(attacks_on_network.network_attacks()),
    "credentials": tuple(attacks_on_credentials.credential_attacks()),
    "resources": tuple(attacks_on_resources.resource_attacks()),
}
_ASKED_ELSEWHERE = {*attacks_on_network.left_to_the_gateway(), "more memory than the bound"}
ATTACKS_ON_A_TIER = {
    kind: tuple(one for one in attacks if one.name not in _ASKED_ELSEWHERE) for kind, attacks in ATTACKS.items()
}
"""Without those that only the gateway answers, which is asked them on another tier; and without what takes the agent
along, which tests/contract asks each tier and tests/acceptance/test_limit_errors.py gVisor."""

_PRELUDES = {
    "network": attacks_on_network.PRELUDE,
    "credentials": attacks_on_credentials.PRELUDE,
    "resources": attacks_on_resources.PRELUDE,
}


_AGENT = f"""
import json, subprocess, sys
session = {{"session_id": sys.argv[sys.argv.index("--session-id") + 1]}}
print(json.dumps({{**{INIT!r}, **session}}), flush=True)
subprocess.run(["sh", "step-0.sh"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(json.dumps({{**{RESULT!r}, **session}}))
"""


class Battlefield:
    """Enter it to have both tasks played; `results` are by attack, everything else is what the host saw.

    user: the uid that the server runs as, who keeps no limits and so is not attacked for resources; root without.
    attacks: from inside, by kind; all of them without.
    has_stand_in: a program of Python's does what the agent is told to, where the agent itself takes minutes to begin.
    evidence: what the host saw of the attacks from inside.
    sent, allowed: packets on the wire, and those that belong there · asked: requests that the host got.
    """

    def __init__(self, directory, tier, *, user=None, attacks=ATTACKS, has_stand_in=False):
        self.directory, self.tier, self.user = Path(directory), tier, user
        self.attacks, self._has_stand_in = attacks, has_stand_in
        self._steps = 3 if attacks is ATTACKS else 1
        self.results, self.evidence = {}, Evidence({})
        self.marker = f"battery-{secrets.token_hex(6)}"
        self.mark, self.canary = self.directory / "mark", self.directory / "canary.txt"
        self.record = self.directory / "host.ndjson"
        self._stack = ExitStack()

    def __enter__(self):
        self._stack.__enter__()
        try:
            self._prepare()
            self._play()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_):
        self._stack.close()

    def _prepare(self):
        self.canary.write_text("the host's own\n")
        internet = self.internet = self._stack.enter_context(ClosedInternet())
        _add_address(internet.internet_prefix, HOST_ADDRESS)
        _add_address(internet.server_prefix, SERVERS_OWN_ADDRESS)
        self.world = World(
            self.directory,
            prefix=(*internet.server_prefix, *self._with_hosts(), *self._as_user()),
            address=INTERNET_ADDRESS,
            namespace=internet.server_namespace,
        )
        self._stack.callback(self.world.close)
        self.socket_file = self.directory / "host.sock"
        self.abstract = f"sandbox-battery-{os.getpid()}-{self.tier}"
        with in_namespace(internet.server_namespace):
            for name in (str(self.socket_file), f"\0{self.abstract}"):
                listener = self._stack.enter_context(socket.socket(socket.AF_UNIX))
                listener.bind(name)
                listener.listen()
        self.socket_file.chmod(0o777)

    def _as_user(self):
        if self.user is None:
            return ()
        os.chown(self.directory, self.user, self.user)
        return ("setpriv", f"--reuid={self.user}", f"--regid={self.user}", "--clear-groups")

    def _with_hosts(self):
        hosts, resolver = self.directory / "hosts", self.directory / "resolv.conf"
        hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in NAMES.items()))
        resolver.write_text("nameserver 127.0.0.1\n")  # where nobody answers
        mounts = f"mount --bind {hosts} /etc/hosts && mount --bind {resolver} /etc/resolv.conf"
        if self.user is not None and sys.base_prefix.startswith("/root/"):
            # Nobody else may walk to a Python in root's home: show it in an otherwise empty one.
            python = self.directory / "python"
            python.mkdir()
            mounts += f" && mount --bind {sys.base_prefix} {python} && mount -t tmpfs -o mode=0755 none /root"
            mounts += f" && mkdir -p {sys.base_prefix} && mount --bind {python} {sys.base_prefix}"
        return ("unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh")

    def _play(self):
        world, internet = self.world, self.internet
        certificate = self.directory / "host.pem"
        _make_certificate(certificate)
        world.start_git(prefix=internet.internet_prefix)
        with (world.home / ".gitconfig").open("a") as config:
            config.write("[credential]\n\thelper = store\n")
        steps = [_run(f"sh step-{number}.sh") for number in range(self._steps)]
        world.start_model(*steps, says(), prefix=internet.internet_prefix)
        program = [sys.executable, fake_host.__file__, HOST_ADDRESS, str(certificate), str(self.record)]
        world._start("host", program, {}, internet.internet_prefix)
        world.start_server(SANDBOX_RUNTIME=self.tier, SSH_AUTH_SOCK=str(self.socket_file), **self._agent())
        self._settings = self._tell_attacks()
        public = certificate.read_text().partition("-----BEGIN CERTIFICATE")
        self._files = {"README.md": "# Hi\n", "ca.pem": "".join(public[1:]), **self._programs()}
        self._make_repository("repo", self._files, *self._plays("network 4", "credentials 3"), "")
        packets = len(internet.packets)
        watched = (world.server.said["pid"], self._settings["SERVER_PID"])
        with HostWatch(self.marker, watched, world.data_dir) as self._watch:
            self._play_tasks()
        self.sent = set(internet.packets[packets:])
        self.evidence = self._gather()
        ports = {int(process.said["url"].rpartition(":")[2]) for process in world.processes if "url" in process.said}
        services = {("tcp", INTERNET_ADDRESS, port) for port in ports}
        self.allowed = services | {("tcp", HOST_ADDRESS, 80), ("tcp", HOST_ADDRESS, 443)}
        self.asked = [json.loads(line) for line in self.record.read_text().splitlines()]

    def _play_tasks(self):
        self.status = self._task(
            "task-1", ["out/**", "nested/**", ".network.json", ".credentials.json"], ("network", "credentials"),
            vm={"network_mode": "outbound", "allowed_hosts": ALLOWED},
        )  # fmt: skip
        assert self.status["state"] == "completed", self.world.tell()
        if self.user is None and self.attacks["resources"]:
            self._play_resources()

    def _gather(self):
        """What the host saw, by the names that attacks use."""
        addresses = {address: name for name, address in self._settings.items() if isinstance(address, str)}
        packets = {(protocol, addresses.get(address, address), port) for protocol, address, port in self.sent}
        return Evidence(self._watch.changes(), frozenset(self._missing), frozenset(packets), tuple(self._watch.samples))

    def _look_for_paths(self):
        """The paths of attacks that the server itself does not find; asked while a sandbox is up."""
        root = f"/proc/{self.world.server.said['pid']}/root"
        paths = {path for attacks in self.attacks.values() for one in attacks for path in one.host_paths}
        return {path for path in paths if not os.path.lexists(root + self._settings.get(path, path))}

    def _agent(self):
        if not self._has_stand_in:
            return {}
        return {"PYTHONPATH": str(make_stand_in_of_python(self.directory / "agent", "/workspace/agent.py"))}

    def _task(self, task_id, patterns, kinds, **parts):
        world = self.world
        world.submit(task_id, lifecycle={"artifact_patterns": patterns, "timeout": f"{TASK_SECONDS}s"}, **parts)
        self._settle(task_id)
        status = world.wait(task_id, TASK_SECONDS)
        for kind in kinds:
            self.results.setdefault(kind, {}).update(json.loads(world.artifact(f".{kind}.json", task_id)))
        return status

    def _settle(self, task_id):
        deadline = time.monotonic() + TASK_SECONDS
        while (state := self.world.status(task_id)["state"]) != "running":
            is_waiting = state not in TERMINAL and time.monotonic() < deadline
            assert is_waiting, f"{state}\n{self.world.tell(task_id)}"
            time.sleep(0.05)
        self._watch.settle()
        self._missing = self._look_for_paths()

    def _play_resources(self):
        """An attack that takes its agent along has failed with it; the next task goes on with the others.

        An agent may also fall to what the attack before has left, when the next one has not begun.
        """
        vm = {"memory": f"{attacks_on_resources.MEMORY_MIB}M", "disk": f"{attacks_on_resources.DISK_MIB}M"}
        given = json.loads(self._files["resources.json"])
        for number in itertools.count(2):
            files = {**self._files, "resources.json": json.dumps(given)}
            self._make_repository(f"resources-{number}", files, *self._plays("resources 1"))
            repository = {"url": f"{ORGANISATION}resources-{number}.git"}
            status = self._task(f"task-{number}", [".resources.json"], ("resources",), vm=vm, repository=repository)
            if status["state"] == "completed":
                return
            played = self.results["resources"]
            under_way = [one for one in given["attacks"] if set(played.get(one["name"], ())) == {"twin"}]
            for one in under_way:
                code = status["error"]["code"]
                played[one["name"]]["attack"] = {"outcome": "refused", "by": [code], "said": "its agent went with it"}
            left = [one for one in given["attacks"] if "attack" not in played.get(one["name"], {})]
            assert len(left) < len(given["attacks"]), status["error"]
            if not left:
                return
            given["attacks"] = left

    def _make_repository(self, name, files, *plays):
        """With a program for each step of the model's; a play without a word lays what collecting stumbles over.

        What is no more than a sample is one step: a turn of the model's takes long in a guest that is emulated.
        """
        lines = [f"python3 battery.py {play}\n" if play else "python3 laid.py\n" for play in plays]
        steps = lines if len(lines) <= self._steps else ["".join(lines)]
        steps += ["true\n"] * (self._steps - len(steps))
        programs = {f"step-{number}.sh": step for number, step in enumerate(steps)}
        make_repository(self.world.repositories / f"{name}.git", {**files, **programs})

    def _plays(self, *plays):
        """What the battery is to be told: the kind of attacks, where results go, how many at once, and for how long."""
        seconds = PLAY_SECONDS_EMULATED if self.tier == "qemu" else PLAY_SECONDS
        return [f"{kind}.json .{kind}.json {at_once} {seconds}" for kind, at_once in map(str.split, plays)]

    def _tell_attacks(self):
        """What attacks know by name."""
        return {
            "HOST": HOST,
            "PUBLIC": PUBLIC_ADDRESS,
            "METADATA": METADATA_ADDRESS,
            "PRIVATE": PRIVATE_ADDRESS,
            "MODEL_HOST": INTERNET_ADDRESS,
            "MODEL_PORT": int(self.world.model_url.rpartition(":")[2]),
            "SERVER": SERVER_ADDRESS,
            "SERVER_PORT": int(self.world.server.said["http"].rpartition(":")[2]),
            "SERVER_PID": self._stack.enter_context(process_outside()).pid,
            "ABSTRACT": self.abstract,
            "SOCKET_FILE": str(self.socket_file),
            "CANARY": str(self.canary),
            "DATA_DIR": str(self.world.data_dir),
            "HOST_GIT": str(self.world.repositories),
            "MARK": str(self.mark),
            "CREDENTIALS": str(self.world.home / ".gitconfig"),
            "MARKER": self.marker,
        }

    def _programs(self):
        header = "".join(f"{name} = {value!r}\n" for name, value in self._settings.items())
        # The wrong way round, so that nobody finds it where the attack itself brought it.
        header += f"NEEDLE = bytes(reversed({SERVER_KEY[::-1].encode()!r}))\n"
        files = {"battery.py": (Path(__file__).parent / "battery.py").read_text()}
        for kind, attacks in self.attacks.items():
            given = [
                {
                    "name": one.name,
                    "attack": one.attack,
                    "twin": one.twin,
                    "hold_seconds": HOLD_SECONDS if one.unchanged else 0,
                }
                for one in attacks
            ]
            files[f"{kind}.json"] = json.dumps({"prelude": header + _PRELUDES[kind], "attacks": given})
        if self._has_stand_in:
            files["agent.py"] = _AGENT
        return {**files, "laid.py": header + attacks_on_collection.LAID}


def _run(command):
    given = {"command": f"{command} 2>&1 | tail -c 2000", "description": "work", "timeout": TOOL_MILLISECONDS}
    return Turn((ToolUse("Bash", given),))


def _make_certificate(path):
    subject = ("-subj", f"/CN={HOST}", "-addext", f"subjectAltName=DNS:{HOST}", "-days", "2")
    key = ("-newkey", "rsa:2048", "-nodes", "-keyout", str(path), "-out", str(path) + ".cert")
    subprocess.run(("openssl", "req", "-x509", *key, *subject), check=True, capture_output=True, timeout=60)
    path.write_text(path.read_text() + Path(str(path) + ".cert").read_text())


def _add_address(prefix, address):
    command = (*prefix, "ip", "address", "add", f"{address}/32", "dev", "lo")
    subprocess.run(command, check=True, capture_output=True, timeout=20)
