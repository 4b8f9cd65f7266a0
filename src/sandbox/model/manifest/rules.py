"""Rules across the fields of a manifest, and checks of what the server offers."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from sandbox.model.egress import clone_endpoint, is_clone_allowed
from sandbox.model.manifest.errors import FieldPath, RuleName
from sandbox.model.manifest.schema import Claude, Vm

_PLACEHOLDER = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


_TOOL = re.compile(r"(?!mcp__)[A-Za-z][A-Za-z0-9_]*(\(.+\))?|mcp__[A-Za-z0-9_-]+(__\*)?", re.ASCII)
_SECOND_TOOL = re.compile(r"\)[\s,]+[A-Za-z0-9_]+\(")

_RESERVED_NAMES = frozenset(
    {
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TMPDIR", "PWD", "IS_SANDBOX", "CLAUDECODE"),
        *("IFS", "ENV", "BASH_ENV", "BASHOPTS", "SHELLOPTS", "GLIBC_TUNABLES"),
        *("NODE_OPTIONS", "NODE_USE_SYSTEM_CA", "MCP_TIMEOUT", "MCP_TOOL_TIMEOUT"),
        *("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY", "https_proxy", "http_proxy", "all_proxy", "no_proxy"),
    }
)
_RESERVED_PREFIXES = ("ANTHROPIC_", "CLAUDE_", "LD_", "BUN_")


class RuleViolation(NamedTuple):
    """A violation of a rule by the value at `path`."""

    path: FieldPath
    rule: RuleName
    message: str


def find_violations(
    data: dict[str, Any],
    profiles: Mapping[str, str] | None,
    clone_hosts: Collection[str] | None = None,
    has_price: Callable[[str], bool] | None = None,
) -> Iterator[RuleViolation]:
    """Yield every violation. The types of the data may be wrong; the schema reports that."""
    yield from _unknown_clone_host(data, clone_hosts)
    yield from _hosts_without_outbound(data)
    yield from _unusable_profile(data, profiles)
    yield from _duplicate_secrets(data)
    yield from _reserved_secrets(data)
    yield from _invalid_tools(data)
    yield from _invalid_mcp_servers(data)
    yield from _unpriced_model(data, has_price)
    yield from _resume_without_headless(data)


def _hosts_without_outbound(data: dict[str, Any]) -> Iterator[RuleViolation]:
    vm = _as_mapping(data.get("vm"))
    if vm.get("allowed_hosts") and vm.get("network_mode", Vm.network_mode) in ("isolated", "full"):
        yield RuleViolation(("vm", "allowed_hosts"), "format", "can only be given with network_mode: outbound")


def _unusable_profile(data: dict[str, Any], profiles: Mapping[str, str] | None) -> Iterator[RuleViolation]:
    profile = _as_mapping(data.get("vm")).get("profile", Vm.profile)
    if profiles is None or not isinstance(profile, str):
        return
    if profile not in profiles:
        offered = ", ".join(name for name in sorted(profiles) if not profiles[name])
        yield RuleViolation(("vm", "profile"), "not_offered", f"must be one of this server's profiles: {offered}")
    elif profiles[profile]:
        yield RuleViolation(("vm", "profile"), "not_offered", profiles[profile])


def _unknown_clone_host(data: dict[str, Any], clone_hosts: Collection[str] | None) -> Iterator[RuleViolation]:
    url = _as_text(_as_mapping(data.get("repository")).get("url"))
    if clone_hosts is None or clone_endpoint(url) is None or is_clone_allowed(url, clone_hosts):
        return
    offered = ", ".join(sorted(clone_hosts)) or "none"
    setting = "the operator can allow more in git.allowed_hosts (sandbox.toml) or SANDBOX_GIT_ALLOWED_HOSTS"
    message = f"must be on one of the hosts from which this server clones: {offered}; {setting}"
    yield RuleViolation(("repository", "url"), "not_offered", message)


def _duplicate_secrets(data: dict[str, Any]) -> Iterator[RuleViolation]:
    seen: set[str] = set()
    for index, secret in enumerate(_as_list(data.get("secrets"))):
        name = _as_mapping(secret).get("name")
        if isinstance(name, str) and name in seen:
            yield RuleViolation(
                ("secrets", index, "name"), "format", "is the name of another secret; names must differ"
            )
        elif isinstance(name, str):
            seen.add(name)


def _reserved_secrets(data: dict[str, Any]) -> Iterator[RuleViolation]:
    """Secrets become environment variables of the agent; none may redirect it or load code into it."""
    for index, secret in enumerate(_as_list(data.get("secrets"))):
        name = _as_text(_as_mapping(secret).get("name"))
        if name in _RESERVED_NAMES or name.startswith(_RESERVED_PREFIXES):
            message = "is reserved for the sandbox or the agent; choose another name"
            yield RuleViolation(("secrets", index, "name"), "format", message)


def _invalid_tools(data: dict[str, Any]) -> Iterator[RuleViolation]:
    """Each entry must be one tool: Claude Code splits entries at commas and silently ignores what it cannot parse."""
    for index, entry in enumerate(_as_list(_as_mapping(data.get("claude")).get("allowed_tools"))):
        text = _as_text(entry)
        if text and (not _TOOL.fullmatch(text) or _SECOND_TOOL.search(text)):
            message = "must be one tool, such as Read, Bash(git *), mcp__server or mcp__server__tool"
            yield RuleViolation(("claude", "allowed_tools", index), "format", message)


def _unpriced_model(data: dict[str, Any], has_price: Callable[[str], bool] | None) -> Iterator[RuleViolation]:
    model = _as_mapping(data.get("claude")).get("model", Claude.model)
    has_budget = "budget_usd" in _as_mapping(data.get("lifecycle"))
    if has_price is not None and has_budget and isinstance(model, str) and not has_price(model):
        message = "cannot be enforced, because the price of claude.model is unknown; set budget_tokens instead"
        yield RuleViolation(("lifecycle", "budget_usd"), "not_offered", message)


def _invalid_mcp_servers(data: dict[str, Any]) -> Iterator[RuleViolation]:
    secrets = {_as_text(_as_mapping(secret).get("name")) for secret in _as_list(data.get("secrets"))}
    config = _as_mapping(_as_mapping(data.get("claude")).get("mcp_config"))
    for name, server in _as_mapping(config.get("mcpServers")).items():
        path = ("claude", "mcp_config", "mcpServers", name)
        if not isinstance(server, dict):
            continue
        if ("command" in server) == ("url" in server):
            yield RuleViolation(path, "format", "must have either a command or a url")
        elif server.get("type") in (("http", "sse") if "command" in server else ("stdio",)):
            yield RuleViolation((*path, "type"), "format", "must be stdio with a command, http or sse with a url")
        for subpath, text in _expanded_texts(server):
            missing = sorted(set(_PLACEHOLDER.findall(text)) - secrets)
            if missing:
                message = f"refers to the secret {missing[0][:100]}, which is not in secrets"
                yield RuleViolation((*path, *subpath), "format", message)


def _expanded_texts(server: dict[str, Any]) -> Iterator[tuple[FieldPath, str]]:
    """Yield the texts in which Claude Code expands `${NAME}`."""
    yield ("url",), _as_text(server.get("url"))
    for index, argument in enumerate(_as_list(server.get("args"))):
        yield ("args", index), _as_text(argument)
    for field in ("env", "headers"):
        for key, value in _as_mapping(server.get(field)).items():
            yield (field, key), _as_text(value)


def _resume_without_headless(data: dict[str, Any]) -> Iterator[RuleViolation]:
    is_headless = _as_mapping(data.get("claude")).get("headless", True)
    if is_headless is False and _as_mapping(data.get("lifecycle")).get("resume") is True:
        yield RuleViolation(("lifecycle", "resume"), "format", "can only be given with headless: true")


def _as_mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else ""
