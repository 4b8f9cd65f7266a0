"""A client of the API server of Kubernetes, and the objects of the API that the engine reads.

Responses are limited in size, and are untrusted until parsed.

Fields that these objects do not declare are ignored, because new versions of Kubernetes add fields. A field of
a different type than declared makes the whole response invalid.
"""

import asyncio
import errno
import os
import re
import ssl
import stat
import time
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Generic, NamedTuple, TypeVar

import msgspec

from sandbox.interfaces.cluster_engine import EngineUnavailableError
from sandbox.model.display_text import replace_unprintable, replacement_character
from sandbox.model.errors import DECODE_ERRORS, error_reason
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
    def was_cancelled_before_start(self) -> bool:
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


Response = TypeVar("Response")

REQUEST_TIMEOUT_SECONDS = 15.0
"""Time limit for one request."""

RESPONSE_BYTES_MAX = 32 * 1024 * 1024
"""Maximum size of a response."""

ITEMS_PER_PAGE = 250
ITEMS_MAX = 25_000
PAGES_MAX = 2 * ITEMS_MAX // ITEMS_PER_PAGE
"""Bounds of a list. The API server may return pages that are smaller than requested."""

CREDENTIALS_RELOAD_SECONDS = 60.0
"""Interval at which the files with the token and the certificates are read again: Kubernetes replaces them."""

PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 1.0, 30.0
"""How long no request is sent after the API server requested a pause: the default, and the maximum."""

MESSAGE_CHARACTERS_MAX = 300
MERGE_PATCH = "application/merge-patch+json"
_FILE_BYTES_MAX = 1024 * 1024
_CONNECT_SECONDS = 5.0
_TOKEN = re.compile(rb"[!-~]{1,65536}")
_ADVICE = "check cluster.kubernetes, and the API server with 'kubectl cluster-info'"


class ApiAddress(NamedTuple):
    """Where to reach the API server. server: its URL. token_file: the token to send. ca_file: the CA certificates."""

    server: str
    token_file: Path
    ca_file: Path


class ApiError(Exception):
    """The API server refuses a request. status: the HTTP status. reason: Kubernetes' name for the error."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


class _Credentials(NamedTuple):
    token: str
    certificates: bytes
    tls: ssl.SSLContext


class ApiClient:
    """Sends requests with the server's token.

    Every method raises EngineUnavailableError if the API server is not responding or its response is invalid, and
    ApiError if it refuses the request.
    """

    def __init__(self, address: ApiAddress) -> None:
        self._address = address
        self._credentials: _Credentials | None = None
        self._read_at = 0.0
        self._is_expired = False
        self._paused_until = 0.0

    async def send(
        self,
        method: str,
        path: str,
        response_type: type[Response],
        *,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
    ) -> Response:
        """Send a request, and parse the response. body: encoded as JSON; None for no body."""
        content = None if body is None else msgspec.json.encode(body)
        headers = {} if body is None else {"Content-Type": content_type}
        try:
            try:
                data = await self._send(method, path, query or {}, headers, content)
            except ApiError as error:
                if error.status != 401:
                    raise
                self._is_expired = True  # the token may have been replaced
                data = await self._send(method, path, query or {}, headers, content)
        except ApiError as error:
            if error.status == 401:
                raise unavailable(f"it rejects the token in {self._address.token_file}") from error
            raise
        try:
            return msgspec.json.decode(data, type=response_type)
        except DECODE_ERRORS as error:
            message = f"The API server responded to {method} {path} in an unknown format: {one_line(str(error))}."
            raise EngineUnavailableError(f"{message} Check cluster.kubernetes.server.") from error

    async def list_all(self, path: str, page_type: type[ObjectList[Item]], selector: str) -> Sequence[Item]:
        """Return all objects that a label selector selects. page_type: the type of a page of the list."""
        try:
            return await self._list_pages(path, page_type, selector)
        except ApiError as error:
            if error.status != 410:
                raise
            return await self._list_pages(path, page_type, selector)  # the list changed too much between two pages

    async def _list_pages(self, path: str, page_type: type[ObjectList[Item]], selector: str) -> Sequence[Item]:
        query = {"limit": str(ITEMS_PER_PAGE)} | ({"labelSelector": selector} if selector else {})
        items: list[Item] = []
        for _ in range(PAGES_MAX):
            page = await self.send("GET", path, page_type, query=query)
            items += page.items or ()
            if len(items) > ITEMS_MAX:
                break
            if not page.metadata.continue_token:
                return items
            query["continue"] = page.metadata.continue_token
        raise unavailable(f"{path} has more than {ITEMS_MAX} objects")

    async def _send(
        self, method: str, path: str, query: Mapping[str, str], headers: Mapping[str, str], content: bytes | None
    ) -> bytes:
        """Return the body of a successful response."""
        import httpx2  # slow to import, and only needed with this engine

        if (pause := self._paused_until - time.monotonic()) > 0:
            raise unavailable(f"it requested a pause of {pause:.0f} s")
        credentials = self._read_credentials()
        headers = {
            **headers,
            "Accept": "application/json",
            "Accept-Encoding": "identity",  # a small compressed response could expand to gigabytes
            "Authorization": f"Bearer {credentials.token}",
        }
        timeout = httpx2.Timeout(REQUEST_TIMEOUT_SECONDS, connect=_CONNECT_SECONDS)
        try:
            async with (
                asyncio.timeout(REQUEST_TIMEOUT_SECONDS),
                httpx2.AsyncClient(verify=credentials.tls, trust_env=False, timeout=timeout) as client,
                client.stream(
                    method, self._address.server.rstrip("/") + path, params=query, headers=headers, content=content
                ) as response,
            ):
                body = bytearray()
                async for part in response.aiter_raw():
                    body += part
                    if len(body) > RESPONSE_BYTES_MAX:
                        raise unavailable(f"a response has more than {RESPONSE_BYTES_MAX} bytes")
        except (httpx2.TimeoutException, TimeoutError) as error:
            raise unavailable(f"no response within {REQUEST_TIMEOUT_SECONDS:g} s") from error
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            raise unavailable(one_line(error_reason(error))) from error
        if not response.is_success:
            self._raise_error(response.status_code, response.headers.get("Retry-After"), bytes(body))
        return bytes(body)

    def _raise_error(self, code: int, retry_after: str | None, body: bytes) -> None:
        """Raise the exception for a failed request, and start a pause if the API server requests one."""
        try:
            status = msgspec.json.decode(body, type=Status)
        except DECODE_ERRORS:
            status = Status()
        message = one_line(status.message) or f"HTTP status {code}"
        if code == 429 or code >= 500:
            if code == 429 or retry_after is not None:
                is_number = retry_after is not None and re.fullmatch(r"\d{1,6}", retry_after, re.ASCII)
                seconds = float(retry_after or 0) if is_number else PAUSE_SECONDS_MIN
                self._paused_until = time.monotonic() + min(max(seconds, PAUSE_SECONDS_MIN), PAUSE_SECONDS_MAX)
            raise unavailable(message)
        raise ApiError(code, one_line(status.reason), message)

    def _read_credentials(self) -> _Credentials:
        """Return the token and the TLS settings, which were read at most CREDENTIALS_RELOAD_SECONDS ago."""
        known = self._credentials
        is_fresh = time.monotonic() - self._read_at < CREDENTIALS_RELOAD_SECONDS and not self._is_expired
        if known is not None and is_fresh:
            return known
        token = _read_file(self._address.token_file, "token").strip()
        certificates = _read_file(self._address.ca_file, "certificates")
        if not _TOKEN.fullmatch(token):
            raise EngineUnavailableError(f"{self._address.token_file} contains no token; check cluster.kubernetes.")
        if known is not None and known.certificates == certificates:
            tls = known.tls
        else:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            tls.minimum_version = ssl.TLSVersion.TLSv1_2
            try:
                tls.load_verify_locations(cadata=certificates.decode("ascii"))
            except (ssl.SSLError, ValueError) as error:
                message = f"{self._address.ca_file} contains no certificates in PEM format; check cluster.kubernetes."
                raise EngineUnavailableError(message) from error
        self._credentials, self._read_at = _Credentials(token.decode(), certificates, tls), time.monotonic()
        self._is_expired = False
        return self._credentials


def unavailable(reason: str) -> EngineUnavailableError:
    """Return the error for a missing or invalid response of the API server."""
    return EngineUnavailableError(f"Kubernetes is not responding ({reason.removesuffix('.')}); {_ADVICE}.")


def one_line(text: str) -> str:
    """Return text from the API server as one printable line of bounded length, without a period at the end."""
    words = " ".join(text[: 4 * MESSAGE_CHARACTERS_MAX].split())
    return replace_unprintable(words, replacement_character)[:MESSAGE_CHARACTERS_MAX].removesuffix(".")


def _read_file(path: Path, content: str) -> bytes:
    """Return the content of a file. Raises EngineUnavailableError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "it is not a regular file")
            return os.read(descriptor, _FILE_BYTES_MAX)
        finally:
            os.close(descriptor)
    except OSError as error:
        message = f"The file with the {content} for Kubernetes, {path}, cannot be read: {error.strerror}"
        raise EngineUnavailableError(f"{message}; check cluster.kubernetes.") from error
