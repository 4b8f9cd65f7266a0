"""The configuration schema: the settings of `sandbox.toml`, environment and options.

Each record is a section of the file, and each field a key. `settings.keys` and `settings.load` read types,
bounds and defaults from here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Le, Len, MaxLen

from sandbox.model.default_server_address import DEFAULT_API_PORT, DEFAULT_WEBSOCKET_PORT
from sandbox.model.fixed_limits import (
    CPU_OVERCOMMIT_FACTOR,
    DISK_OVERCOMMIT_FACTOR,
    MEMORY_OVERCOMMIT_FACTOR,
    NEW_TASKS_FREE_BYTES,
    NEW_TASKS_FREE_PERCENT,
    OUTPUT_FREE_BYTES,
    OUTPUT_FREE_PERCENT,
)
from sandbox.model.manifest.field_formats import (
    BYTE_SIZE,
    DURATION,
    ENVIRONMENT_NAME,
    NO_CONTROL_CHARACTERS,
    Format,
    parse_byte_size,
    parse_duration,
)
from sandbox.model.repository_urls import CLONE_HOST_PATTERN
from sandbox.model.resources import Watermark

if TYPE_CHECKING:
    from sandbox.interfaces.server_services import Retention

UNLIMITED = "unlimited"
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_UNIT_BYTES = {"M": 1024**2, "G": 1024**3, "T": 1024**4}


def _check_age(text: str) -> str | None:
    is_valid = text == UNLIMITED or re.fullmatch(r"[1-9][0-9]{0,5}[smhd]", text, re.ASCII)
    return None if is_valid else "must be 1 to 999999 with the unit s, m, h or d, such as 12h or 90d, or unlimited"


def _check_disk_size(text: str) -> str | None:
    is_valid = text == UNLIMITED or re.fullmatch(r"[1-9][0-9]{0,5}[MGT]", text, re.ASCII)
    return None if is_valid else "must be 1 to 999999 with the unit M, G or T, such as 500M or 20G, or unlimited"


AGE = Format("age", _check_age)
DISK_SIZE = Format("disk_size", _check_disk_size)


def parse_age(text: str) -> int | None:
    """Return the age in seconds; None for unlimited."""
    return None if text == UNLIMITED else int(text[:-1]) * _UNIT_SECONDS[text[-1]]


def parse_disk_size(text: str) -> int | None:
    """Return the size in bytes; None for unlimited."""
    return None if text == UNLIMITED else int(text[:-1]) * _UNIT_BYTES[text[-1]]


_FORBID_EXTRA = {"extra": "forbid"}


@dataclass(frozen=True)
class Description:
    """The description of a key in help and documentation."""

    text: str


class _NotEmpty:
    """Rejects empty text, for example from an unset shell variable: an empty path would mean the current directory."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        """Make pydantic run the check. pydantic is imported here because only validation needs it."""
        from pydantic_core import PydanticCustomError, core_schema

        def check(value: Any) -> Any:
            if value == "":
                raise PydanticCustomError("format", "{complaint}", {"complaint": "must not be empty"})
            return value

        return core_schema.no_info_before_validator_function(check, handler(source))


def _pattern_check(pattern: str, message: str) -> Callable[[str], str | None]:
    compiled = re.compile(pattern, re.ASCII)
    return lambda value: None if compiled.fullmatch(value) else message


_HOST_NAME = Format(
    "host_name", _pattern_check(r"[A-Za-z0-9._-]{1,253}|[0-9A-Fa-f:.]{2,45}", "must be a host name or an IP address")
)
_CLONE_HOST = Format(
    "clone_host",
    _pattern_check(CLONE_HOST_PATTERN, "must be a host name, or '*.' and a domain, with an optional ':port'"),
)
_SERVER_ADDRESS = Format(
    "server_address",
    _pattern_check(r"https?://[^\s/@?#]+/?", "must be http:// or https:// and a host, without credentials"),
)
LEASE_SECONDS_MIN = 30
"""The shortest lease. A worker sends a heartbeat every two seconds, and reconnects after 15 s without a response."""

_RUNTIME = Format("runtime", _pattern_check("auto|bubblewrap|gvisor|qemu", "must be auto, bubblewrap, gvisor or qemu"))
_ENGINE = Format(
    "engine",
    _pattern_check("none|processes|slurm|kubernetes", "must be none, processes, slurm or kubernetes"),
)
_SLURM_NAMES = Format(
    "slurm_names", _pattern_check(r"[A-Za-z0-9_.,-]{1,256}", "must be a name, or several separated by commas")
)
_SLURM_ACCOUNT = Format("slurm_account", _pattern_check(r"[A-Za-z0-9_.][A-Za-z0-9_.-]{0,255}", "must be a name"))
_HTTPS_URL = Format(
    "https_url",
    _pattern_check(r"https://[^\s/@?#]+(/[A-Za-z0-9._/-]*)?", "must be https:// and a host, without credentials"),
)
_KUBERNETES_NAME = Format(
    "kubernetes_name",
    _pattern_check(
        r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", "must be a name of at most 63 lowercase letters, digits and hyphens"
    ),
)
_KUBERNETES_IMAGE = Format(
    "kubernetes_image", _pattern_check(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,511}", "must be the name of an image")
)
_LABEL_KEY = r"([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
_LABEL_VALUE = "([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?"
_LABEL = Format("kubernetes_label", _pattern_check(f"{_LABEL_KEY}={_LABEL_VALUE}", "must be a label, as key=value"))
_TAINT = Format("kubernetes_taint", _pattern_check(_LABEL_KEY, "must be the key of a taint"))
_ABSOLUTE_PATH = Format("absolute_path", _pattern_check(r"/[\x21-\x7e]*", "must be an absolute path without spaces"))


def _check_sbatch_option(value: str) -> str | None:
    from sandbox.cluster_engines.slurm.commands import find_option_error  # local: most servers have no cluster

    return find_option_error(value)


_SBATCH_OPTION = Format("sbatch_option", _check_sbatch_option)


def _check_lease(value: str) -> str | None:
    if (message := DURATION.find_error(value)) is not None:
        return message
    if parse_duration(value) >= LEASE_SECONDS_MIN:
        return None
    return f"must be at least {LEASE_SECONDS_MIN}s: a worker must reach the server again before its lease ends"


_LEASE = Format("lease", _check_lease, DURATION.json_schema)
_LOG_FORMAT = Format("log_format", _pattern_check("text|json", "must be text or json"))
_LOG_LEVEL = Format("log_level", _pattern_check("debug|info|warning|error", "must be debug, info, warning or error"))
Port = Annotated[int, Ge(0), Le(65535)]
Percent = Annotated[float, Ge(0), Le(90)]
DirectoryPath = Annotated[Path, _NotEmpty()]
Factor = Annotated[float, Ge(0.1), Le(1000)]


def default_data_dir() -> Path:
    """Return `$XDG_DATA_HOME/sandbox`."""
    return _user_directory("XDG_DATA_HOME", ".local/share") / "sandbox"


def default_config_file() -> Path:
    """Return `$XDG_CONFIG_HOME/sandbox/sandbox.toml`."""
    return _user_directory("XDG_CONFIG_HOME", ".config") / "sandbox" / "sandbox.toml"


def _user_directory(variable: str, default: str) -> Path:
    home = os.environ.get(variable, "")
    # The XDG Base Directory Specification requires that relative paths be ignored.
    return Path(home) if home.startswith("/") else Path.home() / default


@dataclass(frozen=True, kw_only=True)
class ServerSection:
    """The server's address and data directory, and the runtime for sandboxes."""

    __pydantic_config__ = _FORBID_EXTRA
    host: Annotated[str, Len(1, 253), NO_CONTROL_CHARACTERS, Description("Address to listen on.")] = "127.0.0.1"
    port: Annotated[Port, Description("API port; 0 for any free port.")] = DEFAULT_API_PORT
    ws_port: Annotated[Port, Description("WebSocket port; 0 for any free port.")] = DEFAULT_WEBSOCKET_PORT
    data_dir: Annotated[DirectoryPath, Description("Directory where tasks are stored.")] = field(
        default_factory=default_data_dir
    )
    runtime: Annotated[
        str,
        _RUNTIME,
        Description("Sandbox runtime: bubblewrap, gvisor or qemu; auto selects the strongest runtime that works."),
    ] = "auto"
    host_names: Annotated[
        tuple[Annotated[str, _HOST_NAME], ...],
        MaxLen(64),
        Description("Host names of the server in addition to localhost."),
    ] = ()


@dataclass(frozen=True, kw_only=True)
class OvercommitSection:
    """Overcommit factors for the resources of the machine."""

    __pydantic_config__ = _FORBID_EXTRA
    cpus: Annotated[Factor, Description("Overcommit factor for CPUs.")] = CPU_OVERCOMMIT_FACTOR
    memory: Annotated[Factor, Description("Overcommit factor for memory.")] = MEMORY_OVERCOMMIT_FACTOR
    disk: Annotated[Factor, Description("Overcommit factor for the data directory's disk.")] = DISK_OVERCOMMIT_FACTOR


@dataclass(frozen=True, kw_only=True)
class DiskSection:
    """Minimum free space on the file system of the data directory."""

    __pydantic_config__ = _FORBID_EXTRA
    new_tasks_percent: Annotated[
        Percent,
        Description("Minimum free share of the disk for new tasks; below it, tasks wait and the server is not ready."),
    ] = NEW_TASKS_FREE_PERCENT
    new_tasks_size: Annotated[str, BYTE_SIZE, Description("Free space that is always enough for new tasks.")] = (
        f"{NEW_TASKS_FREE_BYTES // 1024**3}G"
    )
    output_percent: Annotated[
        Percent, Description("Minimum free share of the disk for output; below it, output is dropped.")
    ] = OUTPUT_FREE_PERCENT
    output_size: Annotated[str, BYTE_SIZE, Description("Free space that is always enough for output.")] = (
        f"{OUTPUT_FREE_BYTES // 1024**3}G"
    )

    @property
    def new_tasks(self) -> Watermark:
        """The watermark for new tasks."""
        return Watermark(self.new_tasks_percent, parse_byte_size(self.new_tasks_size))

    @property
    def output(self) -> Watermark:
        """The watermark for output."""
        return Watermark(self.output_percent, parse_byte_size(self.output_size))


@dataclass(frozen=True, kw_only=True)
class GitSection:
    """Restrictions on repositories."""

    __pydantic_config__ = _FORBID_EXTRA
    allowed_hosts: Annotated[
        tuple[Annotated[str, _CLONE_HOST], ...],
        MaxLen(256),
        Description("Hosts from which repositories may be cloned; enforced once access tokens exist."),
    ] = ()


@dataclass(frozen=True, kw_only=True)
class VaultSection:
    """HashiCorp Vault, KV version 2. Its token is read only from `VAULT_TOKEN` in the server's environment."""

    __pydantic_config__ = _FORBID_EXTRA
    address: Annotated[str, Len(1, 2048), _SERVER_ADDRESS, Description("Address of Vault.")] | None = None
    mount: Annotated[str, Len(1, 256), NO_CONTROL_CHARACTERS, Description("Mount path of the KV engine.")] = "secret"


@dataclass(frozen=True, kw_only=True)
class SecretsSection:
    """Sources of task secrets."""

    __pydantic_config__ = _FORBID_EXTRA
    directory: Annotated[DirectoryPath, Description("Directory of secrets with `source: file`.")] | None = None
    environment: Annotated[
        tuple[Annotated[str, ENVIRONMENT_NAME], ...],
        MaxLen(1024),
        Description(
            "Environment variables of the server that `source: env` may use; enforced once access tokens exist."
        ),
    ] = ()
    vault: VaultSection = field(default_factory=VaultSection)


@dataclass(frozen=True, kw_only=True)
class PreserveSection:
    """Preserved sandboxes of failed tasks with `failure_action: preserve`."""

    __pydantic_config__ = _FORBID_EXTRA
    time_to_live: Annotated[str, DURATION, Description("How long a preserved sandbox is kept, from 1s to 168h.")] = (
        "24h"
    )

    @property
    def time_to_live_seconds(self) -> int:
        """The time to live in seconds."""
        return parse_duration(self.time_to_live)


@dataclass(frozen=True, kw_only=True)
class RetentionSection:
    """Retention of finished tasks. The tasks that ended first are removed first."""

    __pydantic_config__ = _FORBID_EXTRA
    older_than: Annotated[
        str, AGE, Description("Age at which a finished task is removed, such as 12h or 90d; or unlimited.")
    ] = "90d"
    keep: Annotated[
        int,
        Ge(0),
        Le(10_000_000),
        Description("Number of finished tasks to keep; the oldest are removed first; 0 for no limit."),
    ] = 10_000
    max_bytes: Annotated[
        str,
        DISK_SIZE,
        Description("Disk space that all finished tasks may use, such as 500M or 20G; or unlimited."),
    ] = UNLIMITED

    @property
    def retention(self) -> Retention:
        """The limits as numbers."""
        from sandbox.interfaces.server_services import (
            Retention,  # local: it imports asyncio, which most commands do not need
        )

        return Retention(parse_age(self.older_than), self.keep or None, parse_disk_size(self.max_bytes))


@dataclass(frozen=True, kw_only=True)
class AccessSection:
    """Limits per client."""

    __pydantic_config__ = _FORBID_EXTRA
    requests_per_minute: Annotated[
        int,
        Ge(0),
        Le(10_000_000),
        Description(
            "Maximum requests per minute for each token, or for each client address if the request has no valid token; "
            "0 for no limit."
        ),
    ] = 6000


@dataclass(frozen=True, kw_only=True)
class SlurmSection:
    """Slurm, which starts the workers if `cluster.engine` is slurm."""

    __pydantic_config__ = _FORBID_EXTRA
    partition: (
        Annotated[
            str,
            _SLURM_NAMES,
            Description("Partition of the jobs, or several separated by commas. If unset, the cluster's default."),
        ]
        | None
    ) = None
    account: (
        Annotated[str, _SLURM_ACCOUNT, Description("Account of the jobs. If unset, the user's default.")] | None
    ) = None
    options: Annotated[
        tuple[Annotated[str, _SBATCH_OPTION], ...],
        MaxLen(32),
        Description(
            "Further options of sbatch, such as --constraint=ssd: constraint, exclude, exclusive, gres, licenses, "
            "nice, nodelist, qos, reservation, tmp or wckey."
        ),
    ] = ()
    sandbox: (
        Annotated[
            str,
            Len(1, 4096),
            _ABSOLUTE_PATH,
            Description(
                "Path of the `sandbox` command on the hosts. If unset, the path of the server's own installation."
            ),
        ]
        | None
    ) = None
    data_dir: Annotated[
        str,
        Len(1, 4096),
        _ABSOLUTE_PATH,
        Description("Directory for the files of workers. Each host uses a subdirectory, so hosts may share it."),
    ] = "/var/lib/sandbox-worker"
    commands: (
        Annotated[
            str,
            Len(1, 4096),
            _ABSOLUTE_PATH,
            Description(
                "Directory of sbatch, squeue, scancel and sinfo. If unset, the standard directories are searched."
            ),
        ]
        | None
    ) = None
    configuration: (
        Annotated[str, Len(1, 4096), _ABSOLUTE_PATH, Description("Path of slurm.conf. If unset, Slurm's default path.")]
        | None
    ) = None


KUBERNETES_ACCOUNT_DIR = "/var/run/secrets/kubernetes.io/serviceaccount"
"""Where Kubernetes provides a Pod's token and the certificates of the API server."""


@dataclass(frozen=True, kw_only=True)
class KubernetesSection:
    """The `kubernetes` engine."""

    __pydantic_config__ = _FORBID_EXTRA
    image: (
        Annotated[str, _KUBERNETES_IMAGE, Description("Container image of the workers, preferably with a digest.")]
        | None
    ) = None
    namespace: Annotated[str, _KUBERNETES_NAME, Description("Namespace of the Jobs.")] = "sandbox"
    service_account: Annotated[
        str, _KUBERNETES_NAME, Description("Service account of the workers; it needs no permissions.")
    ] = "sandbox-worker"
    node_selector: Annotated[
        tuple[Annotated[str, _LABEL], ...],
        MaxLen(32),
        Description("Labels of the nodes that run workers, as key=value."),
    ] = ("kubernetes.io/os=linux",)
    tolerations: Annotated[
        tuple[Annotated[str, _TAINT], ...], MaxLen(32), Description("Keys of taints that workers tolerate.")
    ] = ()
    server: (
        Annotated[
            str,
            Len(1, 2048),
            _HTTPS_URL,
            Description("URL of the API server. If unset, that of the cluster in which this server runs."),
        ]
        | None
    ) = None
    token_file: Annotated[str, Len(1, 4096), _ABSOLUTE_PATH, Description("File with the token for the API server.")] = (
        f"{KUBERNETES_ACCOUNT_DIR}/token"
    )
    ca_file: Annotated[
        str, Len(1, 4096), _ABSOLUTE_PATH, Description("File with the CA certificates for the API server.")
    ] = f"{KUBERNETES_ACCOUNT_DIR}/ca.crt"


@dataclass(frozen=True, kw_only=True)
class ClusterSection:
    """Workers, which an engine starts, on other hosts or on this machine. Experimental."""

    __pydantic_config__ = _FORBID_EXTRA
    engine: Annotated[
        str,
        _ENGINE,
        Description(
            "What starts the workers: slurm or kubernetes (on the hosts of a cluster), or processes (on this machine). "
            "With none, tasks run without workers."
        ),
    ] = "none"
    host: Annotated[
        str, Len(1, 253), NO_CONTROL_CHARACTERS, Description("Address of this machine that workers connect to.")
    ] = "127.0.0.1"
    port: Annotated[int, Ge(1), Le(65535), Description("Port for workers.")] = 8724
    listen_host: (
        Annotated[
            str,
            Len(1, 253),
            NO_CONTROL_CHARACTERS,
            Description("Address to listen on for workers. If unset, the address in cluster.host."),
        ]
        | None
    ) = None
    lease: Annotated[
        str,
        _LEASE,
        Description(
            "How long a sandbox may communicate while its worker has no contact with the server, from 30s to 168h."
        ),
    ] = "10m"
    time_limit: Annotated[
        str, DURATION, Description("How long a worker may run, including the time that a sandbox is preserved.")
    ] = "168h"
    host_key_file: (
        Annotated[
            str,
            Len(1, 4096),
            _ABSOLUTE_PATH,
            Description(
                "File that contains the key with which workers prove that they run on a host of the cluster. The path "
                "is the same on the server and on all hosts. If unset, workers do not have to prove this."
            ),
        ]
        | None
    ) = None
    slurm: SlurmSection = field(default_factory=SlurmSection)
    kubernetes: KubernetesSection = field(default_factory=KubernetesSection)

    @property
    def host_key_path(self) -> Path | None:
        """The path of the file that contains the cluster's host key."""
        return None if self.host_key_file is None else Path(self.host_key_file)

    @property
    def lease_seconds(self) -> int:
        """The lease in seconds."""
        return parse_duration(self.lease)

    @property
    def time_limit_seconds(self) -> int:
        """The time limit in seconds."""
        return parse_duration(self.time_limit)


@dataclass(frozen=True, kw_only=True)
class LogSection:
    """Logs of the server and its runners."""

    __pydantic_config__ = _FORBID_EXTRA
    format: Annotated[str, _LOG_FORMAT, Description("Log format: text or json.")] = "text"
    level: Annotated[str, _LOG_LEVEL, Description("Minimum log level: debug, info, warning or error.")] = "info"


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """All settings, grouped by section."""

    __pydantic_config__ = _FORBID_EXTRA
    server: ServerSection = field(default_factory=ServerSection)
    capacity: OvercommitSection = field(default_factory=OvercommitSection)
    disk: DiskSection = field(default_factory=DiskSection)
    git: GitSection = field(default_factory=GitSection)
    secrets: SecretsSection = field(default_factory=SecretsSection)
    preserve: PreserveSection = field(default_factory=PreserveSection)
    retention: RetentionSection = field(default_factory=RetentionSection)
    access: AccessSection = field(default_factory=AccessSection)
    cluster: ClusterSection = field(default_factory=ClusterSection)
    log: LogSection = field(default_factory=LogSection)
