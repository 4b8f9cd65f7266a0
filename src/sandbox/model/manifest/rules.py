"""Rules that involve several fields of a manifest, and checks against what the server offers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from sandbox.model.input_errors import RuleViolation, closest_name
from sandbox.model.manifest.document import as_list, as_mapping, as_text
from sandbox.model.manifest.schema import HEADLESS_DEFAULT, AgentSchema, Vm
from sandbox.model.repository.allowed_clone_hosts import clone_endpoint, is_clone_allowed

_RESERVED_NAMES = frozenset(
    {
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TMPDIR", "PWD", "IS_SANDBOX"),
        *("IFS", "ENV", "BASH_ENV", "BASHOPTS", "SHELLOPTS", "GLIBC_TUNABLES"),
        *("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY", "https_proxy", "http_proxy", "all_proxy", "no_proxy"),
    }
)
_RESERVED_PREFIX = "LD_"


def find_violations(
    data: dict[str, Any],
    agent: AgentSchema,
    profile_problems: Mapping[str, str] | None,
    clone_hosts: Collection[str] | None = None,
) -> Iterator[RuleViolation]:
    """Yield every violation. Values may have wrong types; the schema reports them."""
    section = as_mapping(data.get(agent.kind))
    yield from _unknown_clone_host(data, clone_hosts)
    yield from _hosts_without_outbound(data)
    yield from _unusable_profile(data, profile_problems)
    yield from _duplicate_secrets(data)
    yield from _reserved_secrets(data, agent)
    secret_names = {as_text(as_mapping(secret).get("name")) for secret in as_list(data.get("secrets"))}
    for violation in agent.find_violations(section, secret_names):
        yield violation._replace(path=(agent.kind, *violation.path))
    yield from _unpriced_models(data, section, agent)
    yield from _resume_without_headless(data, section)


def _hosts_without_outbound(data: dict[str, Any]) -> Iterator[RuleViolation]:
    vm = as_mapping(data.get("vm"))
    if vm.get("allowed_hosts") and vm.get("network_mode", Vm.network_mode) in ("isolated", "full"):
        yield RuleViolation(("vm", "allowed_hosts"), "format", "can only be given with network_mode: outbound")


def _unusable_profile(data: dict[str, Any], profile_problems: Mapping[str, str] | None) -> Iterator[RuleViolation]:
    profile = as_mapping(data.get("vm")).get("profile", Vm.profile)
    if profile_problems is None or not isinstance(profile, str):
        return
    if profile not in profile_problems:
        offered = [name for name in sorted(profile_problems) if not profile_problems[name]]
        message = f"must be one of this server's profiles: {', '.join(offered)}"
        yield RuleViolation(("vm", "profile"), "not_offered", message, closest_name(profile, offered))
    elif profile_problems[profile]:
        yield RuleViolation(("vm", "profile"), "not_offered", profile_problems[profile])


def _unknown_clone_host(data: dict[str, Any], clone_hosts: Collection[str] | None) -> Iterator[RuleViolation]:
    url = as_text(as_mapping(data.get("repository")).get("url"))
    if clone_hosts is None or clone_endpoint(url) is None or is_clone_allowed(url, clone_hosts):
        return
    offered = ", ".join(sorted(clone_hosts)) or "none"
    setting = "the operator can allow more in git.allowed_hosts (sandbox.toml) or SANDBOX_GIT_ALLOWED_HOSTS"
    message = f"must be on one of the hosts from which this server clones: {offered}; {setting}"
    yield RuleViolation(("repository", "url"), "not_offered", message)


def _duplicate_secrets(data: dict[str, Any]) -> Iterator[RuleViolation]:
    seen: set[str] = set()
    for index, secret in enumerate(as_list(data.get("secrets"))):
        name = as_mapping(secret).get("name")
        if isinstance(name, str) and name in seen:
            yield RuleViolation(
                ("secrets", index, "name"), "format", "is the name of another secret; names must differ"
            )
        elif isinstance(name, str):
            seen.add(name)


def _reserved_secrets(data: dict[str, Any], agent: AgentSchema) -> Iterator[RuleViolation]:
    """Yield the secrets that would, as environment variables, redirect the agent or load code into it."""
    for index, secret in enumerate(as_list(data.get("secrets"))):
        name = as_text(as_mapping(secret).get("name"))
        if name in _RESERVED_NAMES or name.startswith(_RESERVED_PREFIX) or agent.is_reserved_variable(name):
            message = "is reserved for the sandbox or the agent; choose another name"
            yield RuleViolation(("secrets", index, "name"), "format", message)


def _unpriced_models(data: dict[str, Any], section: dict[str, Any], agent: AgentSchema) -> Iterator[RuleViolation]:
    if "budget_usd" not in as_mapping(data.get("lifecycle")):
        return
    for name, model in agent.used_models(section):
        if not agent.has_price(model):
            message = (
                f"cannot be enforced, because the price of {agent.kind}.{name} is unknown; set budget_tokens instead"
            )
            yield RuleViolation(("lifecycle", "budget_usd"), "not_offered", message)


def _resume_without_headless(data: dict[str, Any], section: dict[str, Any]) -> Iterator[RuleViolation]:
    if section.get("headless", HEADLESS_DEFAULT) is False and as_mapping(data.get("lifecycle")).get("resume") is True:
        yield RuleViolation(("lifecycle", "resume"), "format", "can only be given with headless: true")
