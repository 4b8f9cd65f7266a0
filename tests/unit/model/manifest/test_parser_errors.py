"""The error for an invalid manifest names the field, the rule and the necessary change."""

import copy
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from doubles.manifests import parse_manifest
from sandbox.agents.claude_code.agent import ClaudeCode
from sandbox.agents.claude_code.manifest_section import claude_section
from sandbox.model.errors import InvalidParameterError
from sandbox.model.fixed_limits import INPUT_ERRORS_MAX
from sandbox.model.manifest import validation
from sandbox.model.manifest.parser import InvalidManifestError, parse_object
from sandbox.model.manifest.schema import Manifest
from sandbox.model.wire.request_bodies import CancelRequest

VALID: dict[str, Any] = {
    "version": "1",
    "kind": "Task",
    "metadata": {"name": "My Task"},
    "repository": {"url": "https://git.example/org/repo.git", "branch": "main"},
    "claude": {"prompt": "Do it"},
}
REMOVED = object()
SECTIONS = "version, kind, metadata, repository, claude, vm, secrets, lifecycle"
VM_FIELDS = "profile, cpus, memory, disk, network_mode, allowed_hosts"
MCP_SERVER_PATH = "claude.mcp_config.mcpServers.x"


def with_value(path: str, value: Any) -> dict[str, Any]:
    manifest = copy.deepcopy(VALID)
    *parents, name = path.split("/")
    record = manifest
    for parent in parents:
        record = record.setdefault(parent, {})
    if value is REMOVED:
        del record[name]
    else:
        record[name] = value
    return manifest


def errors_of(manifest: object) -> list[tuple[str, str]]:
    with pytest.raises(InvalidManifestError) as caught:
        parse_manifest(json.dumps(manifest).encode(), is_json=True)
    return [(error.field, error.rule) for error in caught.value.errors]


INVALID: list[tuple[str, Any, str, str]] = [
    ("version", REMOVED, "version", "required"),
    ("version", None, "version", "required"),
    ("version", "2", "version", "enum"),
    ("version", 2, "version", "enum"),
    ("version", 1.0, "version", "enum"),
    ("version", True, "version", "enum"),
    ("kind", REMOVED, "kind", "required"),
    ("kind", "task", "kind", "enum"),
    ("kind", "Job", "kind", "enum"),
    ("metadata", REMOVED, "metadata", "required"),
    ("metadata", [], "metadata", "type"),
    ("metadata", "My Task", "metadata", "type"),
    ("metadata/name", REMOVED, "metadata.name", "required"),
    ("metadata/name", None, "metadata.name", "required"),
    ("metadata/name", "", "metadata.name", "range"),
    ("metadata/name", "x" * 257, "metadata.name", "range"),
    ("metadata/name", 42, "metadata.name", "type"),
    ("metadata/name", "two\nlines", "metadata.name", "format"),
    ("metadata/name", "red \x1b[31m", "metadata.name", "format"),
    ("metadata/name", "reversed \u202e text", "metadata.name", "format"),
    ("metadata/name", "surrogate \ud800", "metadata.name", "format"),
    ("metadata/id", "stream", "metadata.id", "format"),
    ("metadata/id", "-x", "metadata.id", "format"),
    ("metadata/id", "a..b", "metadata.id", "format"),
    ("metadata/id", "a/b", "metadata.id", "format"),
    ("metadata/id", "x" * 129, "metadata.id", "format"),
    ("metadata/id", "a\n", "metadata.id", "format"),
    ("metadata/id", 7, "metadata.id", "type"),
    ("metadata/labels", {"team": 1}, "metadata.labels.team", "type"),
    ("metadata/labels", {"team": None}, "metadata.labels.team", "type"),
    ("metadata/labels", {"a=b": "c"}, "metadata.labels.a=b", "format"),
    ("metadata/labels", {"team": "a\nb"}, "metadata.labels.team", "format"),
    ("metadata/labels", {"team": "x" * 1025}, "metadata.labels.team", "range"),
    ("metadata/labels", {"x" * 257: "v"}, "metadata.labels." + "x" * 100, "range"),
    ("metadata/labels", {str(n): "" for n in range(65)}, "metadata.labels", "range"),
    ("metadata/labels", ["a"], "metadata.labels", "type"),
    ("metadata/lables", {}, "metadata.lables", "unknown_field"),
    ("repository", REMOVED, "repository", "required"),
    ("repository/url", REMOVED, "repository.url", "required"),
    ("repository/url", "", "repository.url", "format"),
    ("repository/url", "ftp://git.example/repo", "repository.url", "format"),
    ("repository/url", "file:///etc", "repository.url", "format"),
    ("repository/url", "ext::sh -c id", "repository.url", "format"),
    ("repository/url", "/srv/repo.git", "repository.url", "format"),
    ("repository/url", "--upload-pack=id", "repository.url", "format"),
    ("repository/url", "https://user:token@git.example/repo", "repository.url", "format"),
    ("repository/url", "https://token@git.example/repo", "repository.url", "format"),
    ("repository/url", "ssh://git:pw@git.example/repo", "repository.url", "format"),
    ("repository/url", "ssh://-oProxyCommand=id@git.example/repo", "repository.url", "format"),
    ("repository/url", "ssh://-oProxyCommand=id/repo", "repository.url", "format"),
    ("repository/url", "git@git.example:-repo", "repository.url", "format"),
    ("repository/url", "https://git.example/a repo", "repository.url", "format"),
    ("repository/url", "https://git.example/a\nb", "repository.url", "format"),
    ("repository/url", "https://git.example", "repository.url", "format"),
    ("repository/url", "https://[1]/repo", "repository.url", "format"),
    ("repository/url", "https://[::::]/repo", "repository.url", "format"),
    ("repository/url", "http://[192.0.2.1]:3000/repo", "repository.url", "format"),
    ("repository/url", "ssh://git@[12345::]/repo", "repository.url", "format"),
    ("repository/url", "https://git.example:70000/repo", "repository.url", "range"),
    ("repository/branch", REMOVED, "repository.branch", "required"),
    ("repository/branch", "", "repository.branch", "format"),
    ("repository/branch", "-x", "repository.branch", "format"),
    ("repository/branch", "a..b", "repository.branch", "format"),
    ("repository/branch", "a b", "repository.branch", "format"),
    ("repository/branch", "a.lock", "repository.branch", "format"),
    ("repository/branch", "a//b", "repository.branch", "format"),
    ("repository/branch", "a/", "repository.branch", "format"),
    ("repository/branch", ".a", "repository.branch", "format"),
    ("repository/branch", "a.", "repository.branch", "format"),
    ("repository/branch", "a@{1}", "repository.branch", "format"),
    ("repository/branch", "HEAD", "repository.branch", "format"),
    ("repository/commit", "abc", "repository.commit", "format"),
    ("repository/commit", "main", "repository.commit", "format"),
    ("repository/commit", "a" * 65, "repository.commit", "format"),
    ("repository/commit", 1234567, "repository.commit", "type"),
    ("repository/commit", 10**40, "repository.commit", "range"),
    ("repository/subpath", "/etc", "repository.subpath", "format"),
    ("repository/subpath", "../x", "repository.subpath", "format"),
    ("repository/subpath", "a/../../x", "repository.subpath", "format"),
    ("repository/subpath", ".git/hooks", "repository.subpath", "format"),
    ("repository/subpath", "", "repository.subpath", "format"),
    ("claude", None, "claude", "required"),
    ("claude/prompt", REMOVED, "claude.prompt", "required"),
    ("claude/prompt", "", "claude.prompt", "format"),
    ("claude/prompt", " \n ", "claude.prompt", "format"),
    ("claude/prompt", "a\x00b", "claude.prompt", "format"),
    ("claude/prompt", ["a"], "claude.prompt", "type"),
    ("claude/promt", "x", "claude.promt", "unknown_field"),
    ("claude/headless", "no", "claude.headless", "type"),
    ("claude/output_format", "xml", "claude.output_format", "enum"),
    ("claude/model", "", "claude.model", "range"),
    ("claude/skip_permissions", "no", "claude.skip_permissions", "type"),
    ("claude/allowed_tools", "Read", "claude.allowed_tools", "type"),
    ("claude/allowed_tools", [1], "claude.allowed_tools[0]", "type"),
    ("claude/allowed_tools", [""], "claude.allowed_tools[0]", "range"),
    ("claude/allowed_tools", ["Read"] * 257, "claude.allowed_tools", "range"),
    ("claude/allowed_tools", ["Read", "Bash(git *"], "claude.allowed_tools[1]", "format"),
    ("claude/allowed_tools", ["Read,Write"], "claude.allowed_tools[0]", "format"),
    ("claude/allowed_tools", ["Read Write"], "claude.allowed_tools[0]", "format"),
    ("claude/allowed_tools", ["Bash(git *), Write(*)"], "claude.allowed_tools[0]", "format"),
    ("claude/allowed_tools", ["--dangerously-skip-permissions"], "claude.allowed_tools[0]", "format"),
    ("claude/allowed_tools", ["*"], "claude.allowed_tools[0]", "format"),
    ("claude/allowed_tools", ["Bash()"], "claude.allowed_tools[0]", "format"),
    ("claude/allowed_tools", ["mcp__x(y)"], "claude.allowed_tools[0]", "format"),
    ("claude/mcp_config", {}, "claude.mcp_config.mcpServers", "required"),
    ("claude/mcp_config", {"mcpServers": {"x": {"command": "x", "type": "ws"}}}, f"{MCP_SERVER_PATH}.type", "enum"),
    ("claude/mcp_config", {"mcpServers": {"x": {"command": "x", "type": "http"}}}, f"{MCP_SERVER_PATH}.type", "format"),
    (
        "claude/mcp_config",
        {"mcpServers": {"x": {"url": "http://x/", "type": "stdio"}}},
        f"{MCP_SERVER_PATH}.type",
        "format",
    ),
    (
        "claude/mcp_config",
        {"mcpServers": {"x": {"command": "x", "cwd": "/"}}},
        f"{MCP_SERVER_PATH}.cwd",
        "unknown_field",
    ),
    ("claude/max_turns", 0, "claude.max_turns", "range"),
    ("claude/max_turns", 1.5, "claude.max_turns", "type"),
    ("claude/max_turns", "5", "claude.max_turns", "type"),
    ("claude/max_turns", True, "claude.max_turns", "type"),
    ("claude/max_turns", 10**30, "claude.max_turns", "range"),
    ("vm", "big", "vm", "type"),
    ("vm/profile", "fancy", "vm.profile", "not_offered"),
    ("vm/cpus", 0, "vm.cpus", "range"),
    ("vm/cpus", -1, "vm.cpus", "range"),
    ("vm/cpus", 2.5, "vm.cpus", "type"),
    ("vm/cpus", "4", "vm.cpus", "type"),
    ("vm/memory", "8GB", "vm.memory", "format"),
    ("vm/memory", "8g", "vm.memory", "format"),
    ("vm/memory", "0G", "vm.memory", "range"),
    ("vm/memory", 8, "vm.memory", "type"),
    ("vm/memory", "٣G", "vm.memory", "format"),
    ("vm/disk", "lots", "vm.disk", "format"),
    ("vm/network_mode", "none", "vm.network_mode", "enum"),
    ("secrets", {}, "secrets", "type"),
    ("lifecycle/timeout", "24", "lifecycle.timeout", "format"),
    ("lifecycle/timeout", "1d", "lifecycle.timeout", "format"),
    ("lifecycle/timeout", "0s", "lifecycle.timeout", "range"),
    ("lifecycle/timeout", "169h", "lifecycle.timeout", "range"),
    ("lifecycle/timeout", 60, "lifecycle.timeout", "type"),
    ("lifecycle/stage_timeout", "-1s", "lifecycle.stage_timeout", "format"),
    ("lifecycle/failure_action", "keep", "lifecycle.failure_action", "enum"),
    ("lifecycle/artifact_patterns", "*.md", "lifecycle.artifact_patterns", "type"),
    ("lifecycle/artifact_patterns", ["ok", "/etc/*"], "lifecycle.artifact_patterns[1]", "format"),
    ("lifecycle/artifact_patterns", ["../*"], "lifecycle.artifact_patterns[0]", "format"),
    ("lifecycle/artifact_patterns", [""], "lifecycle.artifact_patterns[0]", "format"),
    ("lifecycle/artifact_patterns", [None], "lifecycle.artifact_patterns[0]", "type"),
    ("lifecycle/artifact_patterns", ["x"] * 257, "lifecycle.artifact_patterns", "range"),
    ("lifecycle/budget_usd", -1, "lifecycle.budget_usd", "range"),
    ("lifecycle/budget_usd", float("inf"), "lifecycle.budget_usd", "range"),
    ("lifecycle/retries", 101, "lifecycle.retries", "range"),
    ("lifecycle/retries", -1, "lifecycle.retries", "range"),
    ("lifecycle/resume", "yes", "lifecycle.resume", "type"),
    ("extra", None, "extra", "unknown_field"),
    ("<<", {"a": 1}, "<<", "unknown_field"),
]


@pytest.mark.parametrize(("path", "value", "field", "rule"), INVALID)
def test_invalid_value_is_reported_as_one_error(path, value, field, rule):
    assert errors_of(with_value(path, value)) == [(field, rule)]


COMPLETE: dict[str, Any] = {
    **VALID,
    "metadata": {"name": "x", "id": "task-1", "labels": {"team": "platform"}},
    "repository": {**VALID["repository"], "commit": "c" * 40, "subpath": "src", "patch": "ZGlmZg=="},
    "claude": {
        "prompt": "Do it",
        "model": "claude-sonnet-4-5",
        "headless": True,
        "output_format": "json",
        "allowed_tools": ["Bash", "mcp__x"],
        "mcp_config": {"mcpServers": {"x": {"command": "npx", "args": ["-y"], "env": {"K": "${K}"}}}},
    },
    "vm": {"profile": "basic", "cpus": 1, "memory": "1G", "network_mode": "outbound", "allowed_hosts": ["a.example"]},
    "secrets": [{"name": "K", "source": "env", "key": "K"}],
    "lifecycle": {"timeout": "1h", "artifact_patterns": ["*"], "budget_usd": 1, "retries": 1, "resume": True},
}


def value_paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every nested value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*path, key)
        yield from value_paths(item, (*path, key))


@pytest.mark.parametrize("value", [[], {}, [[1]], [{}], {"a": {}}, [None], None, 1, -1, 1.5, True, "", "x", 10**30])
def test_any_value_at_any_path_is_accepted_or_rejected(value):
    assert len(list(value_paths(COMPLETE))) > 35
    for *parents, last in value_paths(COMPLETE):
        manifest = copy.deepcopy(COMPLETE)
        record: Any = manifest
        for parent in parents:
            record = record[parent]
        record[last] = value
        with suppress(InvalidManifestError):
            parse_manifest(json.dumps(manifest).encode(), is_json=True)


@pytest.mark.parametrize(("characters", "fits"), [(256 * 1024, True), (256 * 1024 + 1, False)])
def test_prompt_limit_is_in_bytes_not_characters(characters, fits):
    body = json.dumps(with_value("claude/prompt", "é" * characters), ensure_ascii=False).encode()
    if fits:
        assert len(parse_manifest(body, is_json=True).agent.prompt) == characters
        return
    with pytest.raises(InvalidManifestError, match="must be at most 512 KiB") as caught:
        parse_manifest(body, is_json=True)
    assert [(error.field, error.rule) for error in caught.value.errors] == [("claude.prompt", "range")]


def test_base_manifest_is_valid():
    assert parse_manifest(json.dumps(VALID).encode(), is_json=True).metadata.name == "My Task"


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "10.1",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "[::1]",
        "*",
        "*.*.org",
        "https://git.example",
        "git.example/x",
        "a b.example",
        "-a.example",
        "git.example:port",
        "x" * 64 + ".example",
        ".".join(["x" * 60] * 5),
        "",
    ],
)
def test_allowed_host_must_be_a_host_name(host):
    vm = {"network_mode": "outbound", "allowed_hosts": [host]}
    assert ("vm.allowed_hosts[0]", "format") in errors_of(with_value("vm", vm))


def parse(manifest: object, **options: Any) -> Manifest:
    return parse_manifest(json.dumps(manifest).encode(), is_json=True, **options)


@pytest.mark.parametrize("host", ["a." * 260_000 + "a", "a." * 260_000 + "-", "a" * 254, "a." * 127 + "a"])
def test_long_allowed_host_is_rejected_quickly(host):
    vm = {"network_mode": "outbound", "allowed_hosts": [host]}
    begin = time.thread_time()
    assert ("vm.allowed_hosts[0]", "format") in errors_of(with_value("vm", vm))
    assert time.thread_time() - begin < 0.1


@pytest.mark.parametrize(
    "host", ["git.example", "xn--bcher-kva.example", "db0x", "*.git.example", "git.example:8443", "*.git.example:22"]
)
def test_valid_host_name_is_accepted(host):
    vm = {"network_mode": "outbound", "allowed_hosts": [host]}
    assert parse(with_value("vm", vm)).vm.allowed_hosts == (host,)


def test_network_mode_full_is_accepted():
    assert parse(with_value("vm", {"network_mode": "full"})).vm.network_mode == "full"


@pytest.mark.parametrize("mode", ["isolated", "full", None])
def test_allowed_hosts_are_rejected_without_outbound(mode):
    vm = {"network_mode": mode, "allowed_hosts": ["git.example"]}
    assert ("vm.allowed_hosts", "format") in errors_of(with_value("vm", vm))


def test_secret_names_must_be_unique():
    secret = {"name": "TOKEN", "source": "env", "key": "TOKEN"}
    errors = errors_of(with_value("secrets", [secret, secret | {"name": "OTHER"}, secret]))
    assert errors == [("secrets[2].name", "format")]


@pytest.mark.parametrize(
    "name",
    [
        *("PATH", "HOME", "BASH_ENV", "LD_PRELOAD", "LD_AUDIT", "NODE_OPTIONS", "BUN_OPTIONS", "BUN_INSPECT"),
        *("ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL", "ANTHROPIC_X", "CLAUDE_CODE_USE_BEDROCK", "MCP_TIMEOUT"),
        *("HTTPS_PROXY", "https_proxy", "NO_PROXY", "all_proxy"),
    ],
)
def test_reserved_environment_variable_is_rejected_as_a_secret_name(name):
    secrets = [{"name": "FINE", "source": "env", "key": "X"}, {"name": name, "source": "env", "key": "X"}]
    assert errors_of(with_value("secrets", secrets)) == [("secrets[1].name", "format")]


@pytest.mark.parametrize(
    "name", ["GITHUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "NPM_TOKEN", "NODE_AUTH_TOKEN", "MY_CLAUDE_KEY", "_X"]
)
def test_unreserved_secret_name_is_accepted(name):
    secret = {"name": name, "source": "env", "key": "X"}
    assert parse(with_value("secrets", [secret])).secrets[0].name == name


@pytest.mark.parametrize(
    "tool",
    [
        *("Read", "Bash(git *)", "Bash(git commit -m 'a, b')", "Edit(app/(group)/**)", "WebFetch(domain:git.example)"),
        *("mcp__github", "mcp__github__get_issue", "mcp__github__*", "mcp__my-server"),
    ],
)
def test_allowed_tool_is_preserved_verbatim(tool):
    assert claude_section(parse(with_value("claude/allowed_tools", [tool]))).allowed_tools == (tool,)


def test_empty_tool_list_differs_from_no_list():
    assert claude_section(parse(with_value("claude/allowed_tools", []))).allowed_tools == ()
    assert claude_section(parse(VALID)).allowed_tools is None


class PricedClaudeCode(ClaudeCode):
    def has_price(self, model: str) -> bool:
        return model in {"claude-known", "claude-sonnet-4-5-20250929"}


PRICED_AGENTS = {"claude": PricedClaudeCode()}


def test_usd_budget_requires_a_priced_model():
    manifest = with_value("lifecycle/budget_usd", 5)
    manifest["claude"]["model"] = "claude-unheard-of"
    with pytest.raises(InvalidManifestError, match="set budget_tokens instead") as caught:
        parse(manifest, agents=PRICED_AGENTS)
    assert [(error.field, error.rule) for error in caught.value.errors] == [("lifecycle.budget_usd", "not_offered")]


def test_usd_budget_requires_prices_for_all_models_of_the_agent():
    class TwoModels(PricedClaudeCode):
        def used_models(self, section: dict[str, Any]) -> Iterator[tuple[str, str]]:
            yield from super().used_models(section)
            yield "fallback_model", "claude-unheard-of"

    manifest = with_value("lifecycle/budget_usd", 5)
    with pytest.raises(InvalidManifestError, match=r"price of claude\.fallback_model is unknown") as caught:
        parse(manifest, agents={"claude": TwoModels()})
    assert [error.field for error in caught.value.errors] == ["lifecycle.budget_usd"]


@pytest.mark.parametrize("model", ["claude-known", None])
def test_usd_budget_is_accepted_with_a_priced_model(model):
    manifest = with_value("claude/model", model)
    manifest["lifecycle"] = {"budget_usd": 0.05}
    assert parse(manifest, agents=PRICED_AGENTS).lifecycle.budget_usd == 0.05


def test_unpriced_model_is_accepted_without_a_usd_budget():
    manifest = with_value("claude/model", "claude-unheard-of")
    manifest["lifecycle"] = {"budget_tokens": 100}
    assert parse(manifest, agents=PRICED_AGENTS).lifecycle.budget_tokens == 100


@pytest.mark.parametrize(
    ("secret", "expected"),
    [
        ({"name": "1X", "source": "env", "key": "x"}, ("secrets[0].name", "format")),
        ({"name": "X", "source": "cloud", "key": "x"}, ("secrets[0].source", "enum")),
        ({"name": "X", "source": "env"}, ("secrets[0].key", "required")),
        ({"name": "X", "source": "env", "key": ""}, ("secrets[0].key", "range")),
        ({"name": "X", "source": "env", "key": "x", "value": "y"}, ("secrets[0].value", "unknown_field")),
        (None, ("secrets[0]", "type")),
    ],
)
def test_invalid_secret_is_reported_with_its_index(secret, expected):
    assert expected in errors_of(with_value("secrets", [secret]))


@pytest.mark.parametrize(
    ("server", "field"),
    [
        ({}, MCP_SERVER_PATH),
        ({"command": None}, MCP_SERVER_PATH),
        ({"command": "x", "url": "http://x/"}, MCP_SERVER_PATH),
        ({"command": "x", "env": {"A": "${NOPE}"}}, f"{MCP_SERVER_PATH}.env.A"),
        ({"command": "x", "args": ["-y", "--key=${NOPE}"]}, f"{MCP_SERVER_PATH}.args[1]"),
        ({"url": "http://x/${NOPE}"}, f"{MCP_SERVER_PATH}.url"),
        (
            {"url": "http://x/", "headers": {"Authorization": "Bearer ${NOPE}"}},
            f"{MCP_SERVER_PATH}.headers.Authorization",
        ),
    ],
)
def test_mcp_server_requires_one_transport_and_declared_secrets(server, field):
    assert (field, "format") in errors_of(with_value("claude/mcp_config", {"mcpServers": {"x": server}}))


@pytest.mark.parametrize("text", ["${TOKEN}", "Bearer ${TOKEN}", "${HOME:-none}", "$NOPE", "${}", "plain"])
def test_placeholder_of_a_declared_secret_is_accepted(text):
    manifest = with_value("claude/mcp_config", {"mcpServers": {"x": {"command": "x", "env": {"A": text}}}})
    manifest["secrets"] = [{"name": "TOKEN", "source": "env", "key": "TOKEN"}]
    assert claude_section(parse(manifest)).mcp_config.mcpServers["x"].env == {"A": text}


def test_all_errors_are_reported_together():
    manifest = with_value("vm", {"cpus": "4", "network": "full", "profile": "mine"})
    del manifest["claude"]["prompt"]
    manifest["repository"]["url"] = "file:///etc"
    assert sorted(errors_of(manifest)) == [
        ("claude.prompt", "required"),
        ("repository.url", "format"),
        ("vm.cpus", "type"),
        ("vm.network", "unknown_field"),
        ("vm.profile", "not_offered"),
    ]


@pytest.mark.parametrize(
    ("path", "misspelled"),
    [
        ("claude/prompt", "promt"),
        ("claude", "clude"),
        ("metadata", "metdata"),
        ("metadata/name", "nmae"),
        ("repository", "repositry"),
        ("repository/branch", "brnch"),
        ("kind", "knd"),
    ],
)
def test_misspelled_required_field_is_reported_as_one_error(path, misspelled):
    *parents, name = path.split("/")
    manifest = with_value(path, REMOVED)
    parent = manifest
    for key in parents:
        parent = parent[key]
    parent[misspelled] = VALID[name] if not parents else "x"
    with pytest.raises(InvalidManifestError) as caught:
        parse_manifest(json.dumps(manifest).encode(), is_json=True)
    [error] = caught.value.errors
    assert (error.field, error.rule) == (".".join([*parents, misspelled]), "unknown_field")
    assert error.message == f"is an unknown field; did you mean '{name}'?"


def test_missing_field_and_unrelated_unknown_field_are_both_reported():
    manifest = with_value("claude/prompt", REMOVED)
    manifest["claude"]["efort"] = "high"
    manifest["metadata"]["promt"] = "in another section"
    assert sorted(errors_of(manifest)) == [
        ("claude.efort", "unknown_field"),
        ("claude.prompt", "required"),
        ("metadata.promt", "unknown_field"),
    ]


def test_misspelled_field_of_a_list_item_is_reported_as_one_error():
    secrets = [{"nmae": "A", "source": "env", "key": "A"}, {"source": "env", "key": "B"}]
    assert sorted(errors_of(VALID | {"secrets": secrets})) == [
        ("secrets[0].nmae", "unknown_field"),
        ("secrets[1].name", "required"),
    ]


def test_misplaced_fields_beyond_the_listed_errors_are_not_searched_for():
    """A body can have thousands of unknown fields, and each search takes time."""
    manifest = VALID | {f"prompt{number}": "x" for number in range(150)}
    with pytest.raises(InvalidManifestError) as caught:
        parse_manifest(json.dumps(manifest).encode(), is_json=True)
    assert {error.suggestion for error in caught.value.errors} == {"claude.prompt"}
    begun = time.process_time()
    with pytest.raises(InvalidManifestError):
        parse_manifest(json.dumps(VALID | {f"promt{n}": "x" for n in range(15_000)}).encode(), is_json=True)
    assert time.process_time() - begun < 5


def test_similar_names_are_searched_for_only_for_the_listed_errors(monkeypatch):
    searched = []
    monkeypatch.setattr(validation, "closest_name", lambda name, *_: searched.append(name))
    with pytest.raises(InvalidParameterError) as caught:
        parse_object(json.dumps({f"reson{number}": "x" for number in range(1000)}).encode(), CancelRequest)
    assert {*searched} == {error.field for error in caught.value.errors}
    assert len({*searched}) == INPUT_ERRORS_MAX


ONE_LINE = 'version: "1"kind: Taskmetadata:  name: My Taskrepository:  url: https://git.example/org/repo.git'


@pytest.mark.parametrize("text", [ONE_LINE, ONE_LINE.replace('"', "") + "\n"])
def test_error_for_a_manifest_without_line_breaks_contains_the_remedy(text):
    """`curl -d @task.yaml` removes the line breaks."""
    with pytest.raises(InvalidManifestError) as caught:
        parse_manifest(text.encode(), is_json=False)
    message = caught.value.errors[0].message
    assert message.startswith("is not valid YAML: ")
    assert message.endswith(
        "; the manifest has only one line: if curl sent it, use --data-binary, because -d removes line breaks"
    )


@pytest.mark.parametrize("text", ["claude: [", "claude:\n  prompt: x\n version: [", "a: b: c"])
def test_other_invalid_yaml_gets_no_advice_about_line_breaks(text):
    with pytest.raises(InvalidManifestError) as caught:
        parse_manifest(text.encode(), is_json=False)
    assert "--data-binary" not in caught.value.errors[0].message


@pytest.mark.parametrize("text", ["# A task\nversion: 1\nkind: Task\n", ONE_LINE])
def test_error_for_yaml_declared_as_json_contains_the_remedy(text):
    with pytest.raises(InvalidManifestError) as caught:
        parse_manifest(text.encode(), is_json=True)
    [error] = caught.value.errors
    assert error.message == (
        "is not valid JSON: expecting value; the text looks like YAML: send it with Content-Type: application/yaml"
    )
    assert (error.line, error.column) == (1, 1)


@pytest.mark.parametrize("text", ['{"version": 1', "version", "[1", '"a": 1', "a:1", ""])
def test_other_invalid_json_gets_no_advice_about_yaml(text):
    with pytest.raises(InvalidManifestError) as caught:
        parse_manifest(text.encode(), is_json=True)
    assert "YAML" not in caught.value.errors[0].message


def test_offered_profile_is_accepted():
    body = json.dumps(with_value("vm", {"profile": "basic"})).encode()
    assert parse_manifest(body, is_json=True, problem_by_profile={"agentic-dev": "", "basic": ""}).vm.profile == "basic"


def test_first_hundred_errors_are_listed_and_all_errors_are_counted():
    manifest = VALID | {f"x{number}": 1 for number in range(250)}
    with pytest.raises(InvalidManifestError, match="250 errors; the first 100 are listed") as caught:
        parse_manifest(json.dumps(manifest).encode(), is_json=True)
    assert len(caught.value.errors) == 100


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("claude/prompt", REMOVED, "is required"),
        ("claude/promts", "x", "is an unknown field; did you mean 'prompt'?"),
        ("vm/zzz", "x", f"is an unknown field; valid fields: {VM_FIELDS}"),
        ("limits", {}, f"is an unknown field; valid fields: {SECTIONS}"),
        ("promt", "x", "is an unknown field; did you mean 'claude.prompt'?"),
        ("vm/timeout", "1h", "is an unknown field; did you mean 'lifecycle.timeout'?"),
        ("vm/cpus", "4", "must be a whole number, not text"),
        ("vm/cpus", 0, "must be at least 1"),
        ("vm/cpus", 5000, "must be at most 4096"),
        ("vm/network_mode", "none", "must be one of isolated, outbound, full"),
        ("lifecycle/retries", 101, "must be at most 100"),
        ("lifecycle/budget_usd", 1e7, "must be at most 1000000"),
        ("version", 2, 'must be "1"'),
        ("metadata/name", 42, "must be text, not a number; put it in quotes"),
        ("vm/memory", 8, "must be a whole number and a unit, such as 512M or 8G; did you mean '8G'?"),
        ("vm/memory", "8", "must be a whole number and a unit, such as 512M or 8G; did you mean '8G'?"),
        ("vm/disk", 512, "must be a whole number and a unit, such as 512M or 8G; did you mean '512M'?"),
        ("vm/memory", 0.5, "must be a whole number and a unit, such as 512M or 8G"),
        ("vm/memory", "8 GB", "must be a whole number and a unit, such as 512M or 8G"),
        ("vm/memory", True, "must be text, not true; put it in quotes"),
        ("lifecycle/timeout", 30, "must be a whole number and a unit, such as 90s, 15m or 24h"),
        ("metadata/name", "x" * 257, "must have at most 256 characters"),
        ("metadata", [], "must be a mapping, not a list"),
        ("lifecycle/artifact_patterns", "x", "must be a list, not text"),
        ("vm/profile", "mine", "must be one of this server's profiles: agentic-dev, basic"),
        ("metadata/\x1b[31m", 1, "is an unknown field; valid fields: name, id, labels"),
    ],
)
def test_error_message_explains_the_rule(path, value, message):
    with pytest.raises(InvalidManifestError) as caught:
        parse_manifest(json.dumps(with_value(path, value)).encode(), is_json=True)
    assert message in [error.message for error in caught.value.errors]
    assert message in caught.value.message or len(caught.value.errors) > 1
    assert caught.value.code == "invalid_manifest"
    assert all("\x1b" not in error.field for error in caught.value.errors)
