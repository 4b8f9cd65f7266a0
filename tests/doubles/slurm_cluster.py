"""A real Slurm cluster of three hosts on this machine, each in separate namespaces.

The cluster and each host have their own network, PID and mount namespaces. Therefore, a host can be killed as a whole
or cut off from the network, and no packet leaves the cluster. The hosts share the kernel, its boot id and its user ids,
and all files outside of /run. Slurm's commands are wrapped in scripts that enter the cluster's network.
Clusters do not affect each other: the addresses exist in their namespaces only, and the configuration is found through
`SLURM_CONF`. If the process that started a cluster dies, the kernel kills the cluster.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

with contextlib.suppress(ImportError):  # the supervisor runs without the project's packages
    import pytest

HOSTS = ("n1", "n2", "n3")
CPUS = 4
MEMORY_MIB = 8000
DISK_MIB = 50_000
KILL_WAIT_SECONDS = 3
"""Time between SIGTERM and SIGKILL."""
READY_SECONDS = 60.0

_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "squeue", "scancel", "sinfo", "scontrol")
_CLIENTS = _PROGRAMS[2:]
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
CONTROLLER_ADDRESS = "10.77.0.254"
_UID_LOCK_DIRECTORY = Path("/run/sandbox-uids")
_INSTALLED_MARKER = Path(sys.prefix) / "share" / "slurm-installed"
"""`script/setup --cluster` creates this file if Slurm is installed."""

_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}({controller})
AuthType=auth/slurm
CredType=auth/slurm
AuthInfo=use_client_ids
SlurmUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SlurmdTimeout={slurmd_timeout}
MessageTimeout=5
KillWait={kill_wait}
MinJobAge={min_job_age}
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=5
StateSaveLocation={directory}/state
SlurmctldPidFile={directory}/slurmctld.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdSpoolDir={directory}/spool.%n
SlurmdPidFile={directory}/%n.pid
SlurmdLogFile={directory}/%n.log
{nodes}
PartitionName=small Nodes=n1 State=UP MaxTime=60
PartitionName=all Nodes=n1,n2,n3 Default=YES State=UP MaxTime=INFINITE
"""


def missing_requirement():
    """Return why no cluster can be started here; None if one can."""
    missing = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"Slurm is not installed (missing: {', '.join(missing)}); run script/setup --cluster"
    if os.geteuid() != 0:
        return "only root can create the namespaces of a Slurm cluster"
    if subprocess.run(["unshare", "--net", "--pid", "--mount", "--fork", "true"], check=False).returncode != 0:
        return "this machine does not allow namespaces"
    return None


def require_slurm():
    """Skip the test if no cluster can be started here; fail if `script/setup --cluster` has prepared this machine."""
    if (reason := missing_requirement()) is not None:
        if _INSTALLED_MARKER.exists():
            pytest.fail(f"script/setup --cluster has installed Slurm, but no cluster can be started: {reason}")
        pytest.skip(reason)


class SlurmCluster:
    """A context manager that starts the cluster and stops it.

    commands: the directory with the wrapped commands. configuration: the path for `SLURM_CONF`.
    network: the path of the network namespace of the controller, whose address is CONTROLLER_ADDRESS.
    """

    def __init__(self, slurmd_timeout=6, cpus=CPUS):
        """Configure the cluster.

        slurmd_timeout: the number of seconds for which a host may be silent. With 6 seconds, the cluster can lose hosts
        if the machine is busy. cpus: the number of CPUs of each host.
        """
        self._slurmd_timeout = slurmd_timeout
        self._cpus = cpus

    def __enter__(self):
        # The path must be short, because the daemons create Unix sockets in it.
        self.directory = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.configuration = self.directory / "slurm.conf"
        self.commands = self.directory / "bin"
        try:
            self._write_files()
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        process = self.__dict__.get("_process")
        if process is not None:
            process.stdin.close()
            process.kill()
            process.wait()
            process.stdout.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _write_files(self):
        for name in ("state", "bin", *(f"spool.{host}" for host in HOSTS)):
            (self.directory / name).mkdir()
        key = self.directory / "slurm.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        (self.directory / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        self.write_configuration()

    def write_configuration(self, min_job_age=300):
        """Write slurm.conf, which the controller reads at startup. min_job_age: how long it keeps ended jobs."""
        nodes = "\n".join(
            f"NodeName={host} NodeHostname={socket.gethostname()} NodeAddr={_address(host)} Port={17000 + number} "
            f"CPUs={self._cpus} RealMemory={MEMORY_MIB * (2 if host == 'n3' else 1)} TmpDisk={DISK_MIB}"
            for number, host in enumerate(HOSTS)
        )
        text = _CONFIGURATION.format(
            host=socket.gethostname(),
            controller=CONTROLLER_ADDRESS,
            kill_wait=KILL_WAIT_SECONDS,
            slurmd_timeout=self._slurmd_timeout,
            min_job_age=min_job_age,
            directory=self.directory,
            nodes=nodes,
        )
        self.configuration.write_text(text)

    def _start(self):
        self._process = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL", "--"),
                *("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
                *(sys.executable, "-I", __file__, str(self.directory)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PATH": _PATH, "SLURM_CONF": str(self.configuration)},
            text=True,
        )
        self._read_reply()
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
        namespaces = f"/proc/{int(children)}/ns"
        self.network = f"{namespaces}/net"
        for name in _CLIENTS:
            script = self.commands / name
            enter = f"nsenter --net={namespaces}/net --mount={namespaces}/mnt --"
            script.write_text(f'#!/bin/sh\nexec /usr/bin/{enter} /usr/bin/{name} "$@"\n')
            script.chmod(0o755)

    def _read_reply(self):
        reply = self._process.stdout.readline()
        assert reply == "ok\n", f"the cluster failed: {reply}{self.logs()}"

    def _request(self, *words):
        self._process.stdin.write(" ".join(words) + "\n")
        self._process.stdin.flush()
        self._read_reply()

    def run(self, *command):
        """Run a Slurm command, and return its output."""
        environment = {"PATH": _PATH, "SLURM_CONF": str(self.configuration)}
        program = [str(self.commands / command[0]), *command[1:]]
        return subprocess.run(program, env=environment, check=True, timeout=30, capture_output=True, text=True).stdout

    def kill_host(self, host):
        """Kill all processes of a host simultaneously, like a power failure."""
        self._request("kill", host)

    def start_host(self, host):
        """Start a host that was killed, and wait until it runs a job."""
        self._request("start", host)

    def cut_off(self, host):
        """Disconnect a host from the network."""
        self._request("cut", host)

    def reconnect(self, host):
        """Connect a host to the network again. If the host is DOWN, it takes up to a minute to run jobs again."""
        self._request("heal", host)

    def kill_controller(self):
        """Kill the controller (SIGKILL)."""
        self._request("kill-controller")

    def start_controller(self):
        """Start the controller, and wait until it responds."""
        self._request("start-controller")

    def pause_controller(self):
        """Stop the controller (SIGSTOP): it accepts connections but does not respond."""
        self._request("signal-controller", "STOP")

    def resume_controller(self):
        """Resume a stopped controller."""
        self._request("signal-controller", "CONT")

    def wait_until_idle(self):
        """Wait until all hosts respond and run no jobs. Slurm disables a host whose processes it could not kill."""

        def is_idle():
            states = dict(line.split() for line in self.run("sinfo", "-hN", "-pall", "-o%N %T").splitlines())
            for host, state in states.items():
                if state.startswith(("down", "drain")):
                    self.run("scontrol", "update", f"NodeName={host}", "State=RESUME")
            return set(states.values()) == {"idle"}

        _wait(is_idle)

    def restrict_to(self, *hosts):
        """Start new jobs on these hosts only. Jobs that are running continue."""
        for host in HOSTS:
            state = ("State=RESUME",) if host in hosts else ("State=DRAIN", "Reason=test")
            with contextlib.suppress(subprocess.CalledProcessError):  # there is nothing to resume
                self.run("scontrol", "update", f"NodeName={host}", *state)

    def host_pids(self):
        """Return the pid of the first process of each running host, keyed by host."""
        found = {}
        for directory in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                words = (directory / "cmdline").read_bytes().decode(errors="replace").split("\0")
                is_own = str(self.configuration).encode() in (directory / "environ").read_bytes()
                # The daemon becomes the first process of its PID namespace.
                if words[:3] == ["slurmd", "-D", "-N"] and is_own and _is_first_in_pid_namespace(directory):
                    found[words[3]] = int(directory.name)
        return found

    def wait_until_saved(self, job_id):
        """Wait until the controller has saved its current state, which includes this job."""
        mark = secrets.token_hex(8)
        self.run("scontrol", "update", f"JobId={job_id}", f"Comment={mark}")
        _wait(lambda: mark.encode() in (self.directory / "state" / "job_state").read_bytes())

    def logs(self):
        """Return the end of each log."""
        return "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in self.directory.glob("*.log"))


def _is_first_in_pid_namespace(directory):
    """Return whether a process is the first one of its PID namespace."""
    status = (directory / "status").read_text()
    return next(line.split()[-1] for line in status.splitlines() if line.startswith("NSpid:")) == "1"


def _address(host):
    return f"10.77.0.{HOSTS.index(host) + 1}"


class _Supervisor:
    """The first process of the cluster's PID namespace: starts the daemons, and kills them when requested."""

    def __init__(self, directory):
        self._directory = directory
        self._hosts = {}
        self._controller = None

    def serve(self):
        # All sandboxes, even those of other tests, share the kernel and must get different user ids.
        uids = self._directory / "uids"
        for directory in (_UID_LOCK_DIRECTORY, uids):
            directory.mkdir(mode=0o700, exist_ok=True)
        _run("mount", "--bind", str(_UID_LOCK_DIRECTORY), str(uids))
        _run("mount", "-t", "tmpfs", "tmpfs", "/run")
        _run("ip", "link", "add", "bridge0", "type", "bridge")
        _run("ip", "address", "add", f"{CONTROLLER_ADDRESS}/24", "dev", "bridge0")
        for device in ("lo", "bridge0"):
            _run("ip", "link", "set", device, "up")
        self._start_controller()
        for host in HOSTS:
            self._start_host(host)
        for host in HOSTS:
            self._wait_until_ready(host)
        _reply("ok")
        for line in sys.stdin:
            try:
                self._execute(*line.split())
            except (OSError, subprocess.SubprocessError) as error:
                _reply(f"error: {error}".replace("\n", " "))
            else:
                _reply("ok")

    def _execute(self, verb, argument=""):
        if verb == "kill":
            process = self._hosts.pop(argument)
            process.kill()
            process.wait()
            # The kernel would remove the device with its namespace, but only later.
            subprocess.run(["ip", "link", "delete", f"to-{argument}"], check=False, timeout=20, capture_output=True)
        elif verb == "start":
            self._start_host(argument)
            self._wait_until_ready(argument)
        elif verb == "cut":
            _run("ip", "link", "set", f"to-{argument}", "down")
        elif verb == "heal":
            _run("ip", "link", "set", f"to-{argument}", "up")
        elif verb == "kill-controller":
            self._controller.kill()
            self._controller.wait()
        elif verb == "start-controller":
            self._start_controller()
            self._wait_for_controller()
        elif verb == "signal-controller":
            self._controller.send_signal(signal.Signals[f"SIG{argument}"])
        else:
            raise ValueError(verb)

    def _start_controller(self):
        with self._log("controller-output") as log:
            self._controller = subprocess.Popen(["slurmctld", "-D"], stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _start_host(self, host):
        device = f"to-{host}"
        start = (
            f"mount -t tmpfs tmpfs /run; mkdir -m 700 {_UID_LOCK_DIRECTORY}; "
            f"mount --bind {self._directory}/uids {_UID_LOCK_DIRECTORY}; ip link set lo up; "
            "until ip link show eth0 2>/dev/null >&2; do sleep 0.01; done; "
            f"ip address add {_address(host)}/24 dev eth0; ip link set eth0 up; exec slurmd -D -N {host}"
        )
        with self._log(f"{host}-output") as log:
            process = subprocess.Popen(
                ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-ec", start],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._hosts[host] = process
        own = Path("/proc/self/ns/net").readlink()
        _wait(lambda: Path(f"/proc/{process.pid}/ns/net").readlink() != own)
        _run("ip", "link", "add", device, "type", "veth", "peer", "name", "eth0", "netns", str(process.pid))
        _run("ip", "link", "set", device, "master", "bridge0", "up")

    def _log(self, name):
        return (self._directory / f"{name}.log").open("ab")

    def _wait_for_controller(self):
        _wait(lambda: _succeeds("scontrol", "ping"))

    def _wait_until_ready(self, host):
        """Wait until the host runs a job. A host that Slurm lists as idle may not have registered yet."""
        job = ("sbatch", "--quiet", "--wait", "--output=/dev/null", f"--nodelist={host}", "--wrap=true")
        _wait(lambda: _succeeds(*job))


def _reply(text):
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _wait(condition):
    deadline = time.monotonic() + READY_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.05)


def _run(*command):
    subprocess.run(command, check=True, timeout=20, stdout=subprocess.DEVNULL)


def _succeeds(*command):
    with contextlib.suppress(subprocess.SubprocessError):
        return subprocess.run(command, check=False, timeout=READY_SECONDS, capture_output=True).returncode == 0
    return False


if __name__ == "__main__":
    _Supervisor(Path(sys.argv[1])).serve()
