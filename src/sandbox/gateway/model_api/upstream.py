"""The address and the credential of the model API, parsed from the settings."""

import re
from urllib.parse import urlsplit

import msgspec

from sandbox.gateway.model_api.value_redactor import ValueRedactor
from sandbox.interfaces.gateway import ModelUpstream
from sandbox.interfaces.model_dialect import ModelDialect


class Upstream(msgspec.Struct, frozen=True):
    """A parsed upstream URL and credential.

    path_prefix: the path of the base URL without trailing slashes.
    credential: the name and value of the header.
    key_redactor: replaces the server's key, without the authentication scheme of the header.
    base_url_variable: the name of the environment variable that contains the address, for messages.
    """

    host: str
    port: int
    is_tls: bool
    path_prefix: bytes
    authority: bytes
    credential: tuple[bytes, bytes]
    key_redactor: ValueRedactor
    base_url_variable: str

    def __repr__(self) -> str:
        """Omit the credential."""
        return f"{type(self).__name__}({self.address!r})"

    @property
    def address(self) -> str:
        """The host, with the port unless it is the default, for messages."""
        return self.authority.decode()


def parse_upstream(upstream: ModelUpstream, dialect: ModelDialect) -> Upstream:
    """Parse and validate the upstream. Raises ValueError, with a message that never contains the credential."""
    variable = dialect.base_url_variable
    try:
        parts = urlsplit(upstream.base_url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError(f"{variable} has an invalid host or port.") from None
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError(f"{variable} must be an http:// or https:// address with a host.")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ValueError(f"{variable} must have no user, password, query or fragment.")
    if port == 0:
        raise ValueError(f"{variable} has port 0, which is invalid.")
    is_tls = parts.scheme == "https"
    host, port = _normalize_host(host, variable), port or (443 if is_tls else 80)
    prefix = parts.path.rstrip("/")
    if not re.fullmatch(r"(/[A-Za-z0-9._~!$&'()*+,;=:@%-]+)*", prefix):
        raise ValueError(f"{variable} has invalid characters in its path.")
    display_host = f"[{host}]" if ":" in host else host
    authority = display_host if port == (443 if is_tls else 80) else f"{display_host}:{port}"
    credential = dialect.credential(upstream)  # raises ValueError for an invalid key
    key_redactor = ValueRedactor(dialect.presented_key(*credential))
    return Upstream(host, port, is_tls, prefix.encode(), authority.encode(), credential, key_redactor, variable)


def _normalize_host(host: str, variable: str) -> str:
    try:
        return host if ":" in host else host.encode("idna").decode()
    except UnicodeError:
        raise ValueError(f"{variable} has an invalid host name.") from None
