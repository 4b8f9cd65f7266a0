"""A manifest is encoded as one mapping, in which the key of the agent section is the agent's kind."""

import dataclasses
import inspect

import msgspec
import pytest

from doubles.manifests import encode_json, parse_manifest
from sandbox.agents.claude_code.manifest_section import claude_section
from sandbox.model.manifest.schema import AgentSection, CommonFields, Manifest, decode_manifest, encode_manifest

# The encoding that version 0.1 wrote to journals and to the index.
ENCODED = (
    '{"version":"1","kind":"Task","metadata":{"name":"N","id":"t-1","labels":{"a":"b"}},"repository":'
    '{"url":"https://example.org/r.git","branch":"main","commit":null,"subpath":"x","patch":null},"cl'
    'aude":{"prompt":"Do it. é","headless":true,"skip_permissions":true,"output_format":"json","model'
    '":"claude-sonnet-4-5-20250929","allowed_tools":["Read","mcp__github"],"mcp_config":{"mcpServers"'
    ':{"github":{"type":null,"command":"npx","args":["-y"],"env":{"T":"${T}"},"url":null,"headers":{}'
    '},"web":{"type":"http","command":null,"args":[],"env":{},"url":"https://h","headers":{"A":"b"}}}'
    '},"max_turns":3},"vm":{"profile":"agentic-dev","cpus":4,"memory":"8G","disk":"40G","network_mode'
    '":"outbound","allowed_hosts":["api.github.com"]},"secrets":[{"name":"T","source":"env","key":"T"'
    '}],"lifecycle":{"timeout":"24h","failure_action":"destroy","artifact_patterns":[],"stage_timeout'
    '":"15m","provision_timeout":"10m","hang_timeout":"30m","collect_timeout":"10m","budget_usd":1.0,'
    '"budget_tokens":null,"retries":2,"resume":false}}'
).encode()
SUBMITTED = {
    "version": 1,
    "kind": "Task",
    "metadata": {"name": "N", "id": "t-1", "labels": {"a": "b"}},
    "repository": {"url": "https://example.org/r.git", "branch": "main", "subpath": "x"},
    "claude": {
        "prompt": "Do it. é",
        "output_format": "json",
        "max_turns": 3,
        "allowed_tools": ["Read", "mcp__github"],
        "mcp_config": {
            "mcpServers": {
                "github": {"command": "npx", "args": ["-y"], "env": {"T": "${T}"}},
                "web": {"type": "http", "url": "https://h", "headers": {"A": "b"}},
            }
        },
    },
    "vm": {"network_mode": "outbound", "allowed_hosts": ["api.github.com"]},
    "secrets": [{"name": "T", "source": "env", "key": "T"}],
    "lifecycle": {"budget_usd": 1, "retries": 2},
}


def decode(text):
    return msgspec.json.decode(text, type=Manifest, dec_hook=decode_manifest)


def without_new_fields(new, old):
    """Return the fields of `new` that `old` also has, in the order of `new`."""
    if not isinstance(new, dict):
        return new
    return {name: without_new_fields(value, old[name]) for name, value in new.items() if name in old}


def test_fields_of_earlier_versions_are_still_encoded_the_same_way():
    encoded = msgspec.json.decode(encode_json(parse_manifest(msgspec.json.encode(SUBMITTED), is_json=True)))
    assert msgspec.json.encode(without_new_fields(encoded, msgspec.json.decode(ENCODED))) == ENCODED


def test_new_fields_have_their_defaults_in_a_manifest_of_an_earlier_version():
    manifest = parse_manifest(msgspec.json.encode(SUBMITTED), is_json=True)
    decoded = decode(ENCODED)
    assert claude_section(decoded) == claude_section(manifest)
    assert decoded.replace(agent=manifest.agent) == manifest
    assert decode(encode_json(decoded)) == decoded


def common_fields():
    """Yield the non-constant fields that the manifests of all agents share, with their defaults."""
    for each in dataclasses.fields(CommonFields):
        if each.name not in ("version", "kind"):
            yield each.name, each.default_factory() if callable(each.default_factory) else each.default


def test_all_common_fields_are_encoded():
    names = [name for name, _ in common_fields()]
    assert {*Manifest.__slots__} == {*names, "agent"}
    manifest = decode(ENCODED)
    assert [name for name in encode_manifest(manifest) if name not in ("version", "kind", "claude")] == names
    assert all(getattr(manifest, name) == encode_manifest(manifest)[name] for name in names)


def test_manifest_has_the_defaults_of_the_common_fields():
    parameters = inspect.signature(Manifest).parameters
    given = {name: parameters[name].default for name, _ in common_fields()}
    absent = {inspect.Parameter.empty: dataclasses.MISSING}
    assert {name: absent.get(value, value) for name, value in given.items()} == dict(common_fields())


def test_only_the_driver_converts_the_fields_of_the_agent_section_to_their_types():
    manifest = decode(ENCODED)
    assert manifest.agent.settings["allowed_tools"] == ["Read", "mcp__github"]
    claude = claude_section(manifest)
    assert claude.allowed_tools == ("Read", "mcp__github")
    assert claude.mcp_config.mcpServers["github"].env == {"T": "${T}"}


def test_section_of_an_unregistered_agent_is_preserved():
    text = ENCODED.replace(b'"claude":{', b'"other":{"its_own":[1,{"x":null}],')
    manifest = decode(text)
    assert (manifest.agent.kind, manifest.agent.settings["its_own"]) == ("other", [1, {"x": None}])
    encoded, old = (msgspec.json.decode(each) for each in (encode_json(manifest), text))
    assert msgspec.json.encode(without_new_fields(encoded, old)) == text


def test_unknown_fields_of_a_later_version_are_ignored():
    text = ENCODED.replace(b'"vm":{', b'"later":{"a":1},"also":"text","vm":{"new":1,')
    assert decode(text) == decode(ENCODED)


@pytest.mark.parametrize(
    "change",
    [
        (b'"claude":{', b'"later":{"prompt":"x","model":"m"},"claude":{'),
        (b'"claude":{"prompt":', b'"claude":{"text":'),
        (b'"prompt":"', b'"prompt":1,"old":"'),
        (b'"headless":true', b'"headless":"yes"'),
        (b'"model":"', b'"model":null,"old":"'),
        (b'"output_format":"json"', b'"output_format":[]'),
        (b'"name":"N"', b'"name":7'),
    ],
)
def test_malformed_manifest_is_rejected(change):
    assert change[0] in ENCODED
    with pytest.raises(msgspec.ValidationError):
        decode(ENCODED.replace(*change, 1))


@pytest.mark.parametrize(
    ("settings", "is_interactive", "has_rendered_stdout"),
    [
        ({}, False, False),
        ({"headless": True, "output_format": "text"}, False, True),
        ({"headless": False, "output_format": "text"}, True, False),
        ({"output_format": "stream-json"}, False, False),
    ],
)
def test_common_fields_have_defaults(settings, is_interactive, has_rendered_stdout):
    section = AgentSection("other", {"prompt": "p", "model": "m", **settings})
    assert (section.prompt, section.model) == ("p", "m")
    assert (section.is_interactive, section.has_rendered_stdout) == (is_interactive, has_rendered_stdout)
    assert section.recorded_stream == ("transcript" if has_rendered_stdout else "stdout")


def test_changing_the_prompt_does_not_change_the_field_order():
    agent = decode(ENCODED).agent
    assert list(agent.with_prompt("").settings) == list(agent.settings)
    assert (agent.with_prompt("").prompt, agent.prompt) == ("", "Do it. é")
