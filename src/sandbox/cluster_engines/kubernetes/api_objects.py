"""The parts of Kubernetes' API objects that the engine reads, and the quantities of resources.

Other fields are ignored, because new versions of Kubernetes add fields. A field with another type than here makes the
whole response invalid.
"""

import re
from fractions import Fraction
from typing import Annotated, Generic, TypeVar

import msgspec

from sandbox.model.resources import Resources

Item = TypeVar("Item")

NAME_PATTERN = r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?"
"""Names of objects. They become parts of paths, so no other characters are accepted."""

WORKER_CONTAINER = "worker"
"""The name of the container that runs the worker."""

AMOUNT_MAX = 2**62
"""Larger quantities count as this amount."""

_QUANTITY_CHARACTERS_MAX = 40
_QUANTITY = re.compile(
    r"(?P<number>\d+(?:\.\d*)?|\.\d+)(?:(?P<suffix>[KMGTPE]i|[numkMGTPE])|[eE](?P<exponent>[+-]?\d{1,2}))?", re.ASCII
)
_FACTORS = {
    **{f"{prefix}i": Fraction(1024) ** power for power, prefix in enumerate("KMGTPE", start=1)},
    **{prefix: Fraction(1000) ** power for power, prefix in enumerate("kMGTPE", start=1)},
    **{prefix: Fraction(1, 1000) ** power for power, prefix in enumerate("mun", start=1)},
}

Name = Annotated[str, msgspec.Meta(pattern=rf"\A{NAME_PATTERN}\Z")]
_Uid = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]


class OwnerReference(msgspec.Struct, frozen=True):
    """The object that controls another object, if `controller` is true."""

    kind: str
    name: str
    controller: bool = False


class ObjectMeta(msgspec.Struct, frozen=True, rename="camel"):
    """The metadata of an object. deletion_timestamp: set once the object is being deleted."""

    name: Name
    uid: _Uid
    labels: dict[str, str] = {}
    owner_references: tuple[OwnerReference, ...] = ()
    deletion_timestamp: str | None = None


class Condition(msgspec.Struct, frozen=True):
    """A condition of a Job, a Pod or a node."""

    type: str
    status: str
    reason: str = ""
    message: str = ""


class JobSpec(msgspec.Struct, frozen=True, rename="camel"):
    """The specification of a Job. active_deadline_seconds: 0 if the Job was cancelled before it had a Pod on a node."""

    active_deadline_seconds: int | None = None


class _Conditions(msgspec.Struct, frozen=True):
    conditions: tuple[Condition, ...] | None = None

    def find(self, *types: str) -> Condition | None:
        """Return the first condition with one of these types that is true."""
        return next((each for each in self.conditions or () if each.type in types and each.status == "True"), None)


class ApiJob(msgspec.Struct, frozen=True):
    """A Job."""

    metadata: ObjectMeta
    spec: JobSpec = JobSpec()
    status: _Conditions = _Conditions()

    @property
    def is_cancelled(self) -> bool:
        """Whether the engine has ended the Job before it had a Pod on a node."""
        return self.spec.active_deadline_seconds == 0


class WaitingState(msgspec.Struct, frozen=True):
    """Why a container has not started."""

    reason: str = ""
    message: str = ""


class TerminatedState(msgspec.Struct, frozen=True, rename="camel"):
    """How a container ended."""

    exit_code: int
    signal: int = 0
    reason: str = ""


class ContainerState(msgspec.Struct, frozen=True):
    """The state of a container, as its node reported it."""

    waiting: WaitingState | None = None
    terminated: TerminatedState | None = None


class ContainerStatus(msgspec.Struct, frozen=True):
    """The status of a container."""

    name: str
    state: ContainerState = ContainerState()


class PodSpec(msgspec.Struct, frozen=True, rename="camel"):
    """The specification of a Pod.

    node_name: empty until the Pod is scheduled. active_deadline_seconds: 1 if the worker was cancelled.
    """

    node_name: Annotated[str, msgspec.Meta(pattern=rf"\A(?:{NAME_PATTERN})?\Z")] = ""
    active_deadline_seconds: int | None = None


class PodStatus(_Conditions, frozen=True, rename="camel"):
    """The status of a Pod. reason, message: why the Pod is in its phase."""

    phase: str = ""
    reason: str = ""
    message: str = ""
    container_statuses: tuple[ContainerStatus, ...] | None = None


class ApiPod(msgspec.Struct, frozen=True):
    """A Pod."""

    metadata: ObjectMeta
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()

    @property
    def job(self) -> str:
        """The name of the Job that controls this Pod; empty if there is none."""
        owners = self.metadata.owner_references
        return next((each.name for each in owners if each.controller and each.kind == "Job"), "")

    @property
    def worker_state(self) -> ContainerState:
        """The state of the worker's container."""
        statuses = self.status.container_statuses or ()
        return next((each.state for each in statuses if each.name == WORKER_CONTAINER), ContainerState())


class Taint(msgspec.Struct, frozen=True):
    """A taint of a node: Pods that do not tolerate the taint are kept off the node."""

    key: str
    effect: str


class NodeSpec(msgspec.Struct, frozen=True):
    """The specification of a node. unschedulable: whether the node is cordoned."""

    unschedulable: bool = False
    taints: tuple[Taint, ...] | None = None


class NodeStatus(_Conditions, frozen=True):
    """The status of a node. allocatable: the quantities that all Pods together can request there, keyed by resource."""

    allocatable: dict[str, str] = {}


class ApiNode(msgspec.Struct, frozen=True):
    """A node."""

    metadata: ObjectMeta
    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()

    def resources(self) -> Resources:
        """Return the resources that all Pods together can request on the node. Raises ValueError."""
        names = ("cpu", "memory", "ephemeral-storage")
        return Resources(*(parse_quantity(self.status.allocatable.get(name, "0")) for name in names))


class ListMeta(msgspec.Struct, frozen=True):
    """The metadata of a page of a list. continue_token: selects the next page; empty on the last page."""

    continue_token: Annotated[str, msgspec.Meta(max_length=8192)] = msgspec.field(name="continue", default="")


class ObjectList(msgspec.Struct, Generic[Item], frozen=True):
    """A page of a list."""

    items: tuple[Item, ...] | None
    metadata: ListMeta = ListMeta()


class User(msgspec.Struct, frozen=True):
    """The user of a token. extra: further facts, such as the Pod that a token is bound to."""

    username: str = ""
    extra: dict[str, tuple[str, ...]] = {}


class TokenReviewStatus(msgspec.Struct, frozen=True):
    """The result of a TokenReview. audiences: the requested audiences for which the token is valid."""

    authenticated: bool = False
    audiences: tuple[str, ...] = ()
    user: User = User()


class TokenReview(msgspec.Struct, frozen=True):
    """Whether a token is valid."""

    status: TokenReviewStatus


class AccessReviewStatus(msgspec.Struct, frozen=True):
    """The result of a SelfSubjectAccessReview."""

    allowed: bool


class AccessReview(msgspec.Struct, frozen=True):
    """Whether the server has a permission."""

    status: AccessReviewStatus


class VersionInfo(msgspec.Struct, frozen=True, rename="camel"):
    """The version of Kubernetes."""

    git_version: str


class Status(msgspec.Struct, frozen=True):
    """Why a request failed."""

    reason: str = ""
    message: str = ""


def parse_quantity(text: str) -> int:
    """Return a quantity of a resource, rounded down, at most AMOUNT_MAX. Raises ValueError."""
    found = _QUANTITY.fullmatch(text) if len(text) <= _QUANTITY_CHARACTERS_MAX else None
    if found is None:
        raise ValueError(f"not a quantity: {text[:_QUANTITY_CHARACTERS_MAX]!r}")
    factor = _FACTORS.get(found["suffix"] or "", Fraction(1)) * Fraction(10) ** int(found["exponent"] or 0)
    return min(int(Fraction(found["number"].rstrip(".")) * factor), AMOUNT_MAX)
