"""The control plane and the nodes of the double: Jobs get Pods, and Pods run their containers as local processes.

One thread does what the Job controller, the scheduler and the kubelets do. The rules come from the documentation of
Kubernetes: a Job with `backoffLimit: 0` fails with its first Pod, its end deletes its active Pods, and only a node
reports what happened to a container.
"""

import contextlib
import copy
import datetime
import os
import re
import signal
import subprocess
import threading
import time
import uuid

TICK_SECONDS = 0.03
FINISHED = ("Complete", "Failed")


def now():
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_quantity(text):
    """Return a quantity in the forms that the double uses."""
    number, suffix = re.fullmatch(r"(\d+)(m|[KMG]i)?", text).groups()
    return int(number) * {"m": 0.001, "Ki": 1024, "Mi": 1024**2, "Gi": 1024**3, None: 1}[suffix]


def expand(text, environment):
    """Replace references to variables as Kubernetes does: `$(NAME)` by the value, and `$$` by `$`."""
    return re.sub(
        r"\$(?:\$|\(([^)]*)\))",
        lambda found: "$" if found[1] is None else environment.get(found[1], found[0]),
        text,
    )


class Container:
    """The process of a Pod's container, in a session of its own."""

    def __init__(self, command, environment, grace_seconds, log):
        self.grace_seconds = grace_seconds
        self.killed_at = None
        self.started_at = time.monotonic()
        self.process, self.code, self.reason = None, None, None
        try:
            self.process = subprocess.Popen(
                command,
                env=environment,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        except OSError:
            self.code, self.reason = 128, "StartError"

    def poll(self):
        """Return whether the process has ended."""
        if self.code is None and self.process.poll() is not None:
            code = self.process.returncode
            self.code = 128 - code if code < 0 else code
            self.reason = self.reason or ("Error" if self.code else "Completed")
        return self.code is not None

    def terminate(self):
        """Send SIGTERM, and SIGKILL after the grace period. Called repeatedly."""
        if self.poll():
            return
        if self.killed_at is None:
            self.killed_at = time.monotonic() + self.grace_seconds
            self.process.send_signal(signal.SIGTERM)
        elif time.monotonic() > self.killed_at:
            self.kill()

    def kill(self, reason=None):
        self.reason = reason or self.reason
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def close(self):
        self.kill()


class Volumes:
    """Volumes of Pods. A process has no mounts of its own, so paths in its environment are replaced.

    programs: what replaces the first words of commands, because the programs of the image are elsewhere.
    image_environment: the environment variables of the image.
    issue_token: returns the token for a Pod and an audience. prepare: called with the directory of an `emptyDir`.
    """

    def __init__(self, directory, programs, image_environment, issue_token, prepare):
        self.directory, self.programs, self.image_environment = directory, programs, image_environment
        self.issue_token, self.prepare = issue_token, prepare

    def mount(self, pod, container):
        """Create the volumes; return the directories, keyed by their paths in the container."""
        mounts = {}
        for mount in container["volumeMounts"]:
            [volume] = [each for each in pod["spec"]["volumes"] if each["name"] == mount["name"]]
            path = self.path_of(pod) / mount["name"]
            if "emptyDir" in volume:
                self.prepare(path)
            elif "projected" in volume:
                path.mkdir(parents=True)
                [source] = volume["projected"]["sources"]
                token = source["serviceAccountToken"]
                (path / token["path"]).write_text(self.issue_token(pod, token["audience"]))
            mounts[mount["mountPath"]] = path
        return mounts

    def path_of(self, pod):
        return self.directory / pod["metadata"]["name"]

    def replace_program(self, command):
        for words, replacement in self.programs.items():
            if tuple(command[: len(words)]) == words:
                return [*replacement, *command[len(words) :]]
        return command


class KubernetesCluster:
    """The objects of one namespace, and the nodes. `lock` protects them.

    volumes: None if no worker uses its volumes.
    """

    def __init__(self):
        self.lock = threading.RLock()
        self.jobs, self.pods, self.nodes = {}, {}, {}
        self.containers, self.unresponsive, self.paused = {}, set(), False
        self.missing_images, self._with_pod, self._started_at = set(), set(), {}
        self.volumes = None
        self._revision = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kubernetes", daemon=True)
        self._thread.start()

    def close(self):
        """End all processes."""
        self._stopping.set()
        self._thread.join(10)
        for container in self.containers.values():
            container.close()

    def add_node(self, name, cpu="4", memory="1000Mi", disk="10Gi", labels=(), taints=()):
        """Add a node that is ready."""
        conditions = [{"type": "Ready", "status": "True", "reason": "KubeletReady"}]
        with self.lock:
            self.nodes[name] = {
                "metadata": self.metadata(name, {"kubernetes.io/os": "linux", **dict(labels)}),
                "spec": {"taints": [{"key": key, "effect": effect} for key, effect in taints]} if taints else {},
                "status": {
                    "allocatable": {"cpu": cpu, "memory": memory, "ephemeral-storage": disk, "pods": "110"},
                    "capacity": {"cpu": cpu, "memory": memory, "ephemeral-storage": disk, "pods": "110"},
                    "conditions": conditions,
                },
            }

    def metadata(self, name, labels, **fields):
        """Return the metadata of a new object."""
        self._revision += 1
        return {
            "name": name,
            "uid": str(uuid.uuid4()),
            "resourceVersion": str(self._revision),
            "creationTimestamp": now(),
            "labels": dict(labels),
            **fields,
        }

    def create_job(self, job, namespace):
        """Store a new Job with the defaults of the API server."""
        job = copy.deepcopy(job)
        meta = job["metadata"]
        job["metadata"] = self.metadata(meta["name"], meta.get("labels", {}), namespace=namespace, generation=1)
        job["spec"] |= {"completionMode": "NonIndexed", "suspend": False}
        job["status"] = {}
        self.jobs[meta["name"]] = job
        return job

    def pods_of(self, job):
        uid = job["metadata"]["uid"]
        return [pod for pod in self.pods.values() if pod["metadata"]["ownerReferences"][0]["uid"] == uid]

    def is_finished(self, job):
        return any(each["type"] in FINISHED for each in job["status"].get("conditions", []))

    def delete_pod(self, name):
        """Delete a Pod gracefully, as an eviction does. A Pod without a node is removed immediately."""
        with self.lock:
            pod = self.pods[name]
            if pod["spec"].get("nodeName"):
                pod["metadata"].setdefault("deletionTimestamp", now())
                pod["metadata"]["deletionGracePeriodSeconds"] = pod["spec"]["terminationGracePeriodSeconds"]
            else:
                del self.pods[name]

    def lose_node(self, name):
        """Cut a node off from the network. Its processes continue; the control plane gives up on its Pods."""
        with self.lock:
            self.unresponsive.add(name)
            [ready] = self.nodes[name]["status"]["conditions"]
            ready |= {"status": "Unknown", "reason": "NodeStatusUnknown", "message": "Kubelet stopped posting status."}
            for pod in self.pods.values():
                if pod["spec"].get("nodeName") == name:
                    self.set_condition(pod, "DisruptionTarget", "DeletionByTaintManager", "Taint manager: deleting")
                    self.delete_pod(pod["metadata"]["name"])

    def return_node(self, name):
        """Reconnect a node."""
        with self.lock:
            self.unresponsive.discard(name)
            [ready] = self.nodes[name]["status"]["conditions"]
            ready |= {"status": "True", "reason": "KubeletReady", "message": ""}

    def set_condition(self, target, kind, reason, message=""):
        conditions = target["status"].setdefault("conditions", [])
        conditions[:] = [each for each in conditions if each["type"] != kind]
        conditions.append({"type": kind, "status": "True", "reason": reason, "message": message})

    def _run(self):
        while not self._stopping.wait(TICK_SECONDS):
            with self.lock:
                if self.paused:
                    continue
                for job in list(self.jobs.values()):
                    self._sync_job(job)
                for pod in list(self.pods.values()):
                    if not pod["spec"].get("nodeName"):
                        self._schedule(pod)
                    elif pod["spec"]["nodeName"] not in self.unresponsive:
                        self._sync_pod(pod)

    def _sync_job(self, job):
        """Do what the Job controller does."""
        status, pods = job["status"], self.pods_of(job)
        if self.is_finished(job):
            for pod in pods:
                if pod["status"]["phase"] not in {"Succeeded", "Failed"}:
                    self.delete_pod(pod["metadata"]["name"])
            return
        uid = job["metadata"]["uid"]
        had_pod = uid in self._with_pod
        status.setdefault("startTime", now())
        started_at = self._started_at.setdefault(uid, time.monotonic())
        phases = {pod["status"]["phase"] for pod in pods}
        failed = (
            "Failed" in phases or (had_pod and not pods) or any("deletionTimestamp" in pod["metadata"] for pod in pods)
        )
        deadline = job["spec"].get("activeDeadlineSeconds")
        if "Succeeded" in phases:
            self.set_condition(job, "Complete", "CompletionsReached")
        elif failed:
            self.set_condition(job, "Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")
        elif deadline is not None and time.monotonic() - started_at >= deadline:
            self.set_condition(job, "Failed", "DeadlineExceeded", "Job was active longer than specified deadline")
        elif not pods:
            self._create_pod(job)
            self._with_pod.add(uid)

    def _create_pod(self, job):
        meta, template = job["metadata"], copy.deepcopy(job["spec"]["template"])
        owner = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "name": meta["name"],
            "uid": meta["uid"],
            "controller": True,
            "blockOwnerDeletion": True,
        }
        name = f"{meta['name']}-{uuid.uuid4().hex[:5]}"
        labels = {**template["metadata"].get("labels", {}), "batch.kubernetes.io/job-name": meta["name"]}
        fields = {"namespace": meta["namespace"], "ownerReferences": [owner]}
        self.pods[name] = {
            "metadata": self.metadata(name, labels, **fields),
            "spec": template["spec"],
            "status": {"phase": "Pending"},
        }

    def _schedule(self, pod):
        """Do what the scheduler does."""
        reasons = []
        for name, node in sorted(self.nodes.items()):
            if (reason := self._unfit_reason(pod, node)) is None:
                pod["spec"]["nodeName"] = name
                return
            reasons.append(reason)
        message = f"0/{len(self.nodes)} nodes are available: {', '.join(sorted(reasons))}."
        pod["status"]["conditions"] = [
            {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
        ]

    def _unfit_reason(self, pod, node):
        spec, name = pod["spec"], node["metadata"]["name"]
        tolerated = {each["key"] for each in spec["tolerations"]}
        if name in self.unresponsive or node["spec"].get("unschedulable"):
            return "1 node(s) were unschedulable"
        if not spec["nodeSelector"].items() <= node["metadata"]["labels"].items():
            return "1 node(s) didn't match Pod's node affinity/selector"
        for term in _terms(spec):
            if any(name in field["values"] for field in term["matchFields"]):
                return "1 node(s) didn't match Pod's node affinity/selector"
        if any(taint["key"] not in tolerated for taint in node["spec"].get("taints", [])):
            return "1 node(s) had untolerated taint"
        for resource, total in node["status"]["allocatable"].items():
            others = (
                _request(other, resource)
                for other in self.pods.values()
                if other["spec"].get("nodeName") == name and other["status"]["phase"] not in {"Succeeded", "Failed"}
            )
            if sum(others) + _request(pod, resource) > parse_quantity(total):
                return f"1 Insufficient {resource}"
        return None

    def _sync_pod(self, pod):
        """Do what the kubelet of a node does."""
        meta, spec, status = pod["metadata"], pod["spec"], pod["status"]
        container = self.containers.get(meta["uid"])
        if status["phase"] in {"Succeeded", "Failed"}:
            if "deletionTimestamp" in meta:
                del self.pods[meta["name"]]
            return
        if container is None:
            if "deletionTimestamp" in meta:
                del self.pods[meta["name"]]
            else:
                self._start(pod)
            return
        age = time.monotonic() - container.started_at
        is_late = age >= spec["activeDeadlineSeconds"]
        if "deletionTimestamp" in meta or is_late:
            container.terminate()
        if not container.poll():
            return
        code = container.code
        times = {"startedAt": now(), "finishedAt": now()}
        state = {"terminated": {"exitCode": code, "reason": container.reason, **times}}
        status["phase"] = "Failed" if code or is_late else "Succeeded"
        if is_late:
            status |= {"reason": "DeadlineExceeded", "message": "Pod was active on the node longer than the deadline"}
        status["containerStatuses"] = [self._container_status(spec, state)]

    def _start(self, pod):
        """Start the container, unless its image is missing."""
        spec, status = pod["spec"], pod["status"]
        [container] = spec["containers"]
        status.setdefault("startTime", now())
        if container["image"] in self.missing_images:
            waiting = {"reason": "ImagePullBackOff", "message": f'Back-off pulling image "{container["image"]}"'}
            status["containerStatuses"] = [self._container_status(spec, {"waiting": waiting})]
            return
        environment = {"PATH": "/usr/bin:/bin", "HOSTNAME": pod["metadata"]["name"]}
        environment |= {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "443"}
        for variable in container["env"]:
            if "valueFrom" in variable:
                assert variable["valueFrom"]["fieldRef"]["fieldPath"] == "spec.nodeName"
                environment[variable["name"]] = spec["nodeName"]
            else:
                environment[variable["name"]] = expand(variable["value"], environment)
        command, log = [expand(each, environment) for each in container["command"]], subprocess.DEVNULL
        with contextlib.ExitStack() as stack:
            if self.volumes is not None:
                for mount, path in self.volumes.mount(pod, container).items():
                    environment |= {
                        name: value.replace(mount, str(path), 1)
                        for name, value in environment.items()
                        if value == mount or value.startswith(f"{mount}/")
                    }
                environment |= self.volumes.image_environment
                command = self.volumes.replace_program(command)
                log = stack.enter_context((self.volumes.path_of(pod) / "log").open("ab"))
            grace_seconds = spec["terminationGracePeriodSeconds"]
            self.containers[pod["metadata"]["uid"]] = Container(command, environment, grace_seconds, log)
        status["phase"] = "Running"
        status["containerStatuses"] = [self._container_status(spec, {"running": {"startedAt": now()}})]

    def _container_status(self, spec, state):
        [container] = spec["containers"]
        is_running = "running" in state
        return {
            "name": container["name"],
            "image": container["image"],
            "imageID": "",
            "ready": is_running,
            "restartCount": 0,
            "started": is_running,
            "state": state,
        }


def _terms(spec):
    affinity = spec.get("affinity", {}).get("nodeAffinity", {})
    return affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", [])


def _request(pod, resource):
    [container] = pod["spec"]["containers"]
    return parse_quantity(container["resources"]["requests"].get(resource, "0"))
