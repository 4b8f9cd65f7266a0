"""Accepted manifests: written by hand, sent by programs, and from the quick reference."""

import json

import msgspec
import pytest

from doubles.manifests import encode_json, parse_manifest, to_builtins
from sandbox.agents.claude_code.manifest_section import claude_section
from sandbox.model.manifest.schema import Manifest, decode_manifest

MINIMAL = """\
version: "1"
kind: Task
metadata:
  name: "My Task"
repository:
  url: "https://github.com/org/repo.git"
  branch: "main"
claude:
  prompt: "Your instructions here"
"""

BUG_FIX = """\
version: "1"
kind: Task
metadata:
  name: "Fix bug #42"
repository:
  url: "https://github.com/org/app.git"
  branch: "main"
claude:
  prompt: "Fix the bug in GitHub issue #42"
  mcp_config:
    mcpServers:
      github:
        command: "npx"
        args: ["-y", "@modelcontextprotocol/server-github"]
        env:
          GITHUB_TOKEN: "${GITHUB_TOKEN}"
vm:
  network_mode: "outbound"
  allowed_hosts: ["api.github.com"]
secrets:
  - name: "GITHUB_TOKEN"
    source: "env"
    key: "GITHUB_TOKEN"
lifecycle:
  artifact_patterns: ["*.patch"]
"""

AUDIT = """\
version: "1"
kind: Task
metadata:
  name: "Security Audit"
repository:
  url: "https://github.com/org/app.git"
  branch: "production"
claude:
  prompt: |
    Perform security audit:
    1. Run static analysis
    2. Check dependencies
    3. Generate report
  allowed_tools: ["Read", "Bash", "Grep", "Write"]
vm:
  network_mode: "isolated"  # No network for security
lifecycle:
  timeout: "8h"
  artifact_patterns: ["security-report.md"]
"""

LARGE = """\
version: "1"
kind: Task
metadata:
  name: "Heavy Processing"
repository:
  url: "https://github.com/org/app.git"
  branch: "main"
claude:
  prompt: "Process large dataset"
vm:
  cpus: 16
  memory: "32G"
  disk: "100G"
  profile: "agentic-dev"
lifecycle:
  timeout: "24h"
"""


def parse(text: str) -> Manifest:
    return parse_manifest(text.encode(), is_json=False)


def test_minimal_manifest_has_the_documented_defaults():
    manifest = parse(MINIMAL)
    assert manifest.metadata.name == "My Task"
    assert manifest.vm.profile == "agentic-dev"
    assert manifest.vm.cpus == 4
    assert manifest.vm.memory_bytes == 8 * 1024**3
    assert manifest.vm.disk_bytes == 40 * 1024**3
    assert manifest.vm.network_mode == "isolated"
    assert claude_section(manifest).headless is True
    assert claude_section(manifest).skip_permissions is True
    assert claude_section(manifest).output_format == "stream-json"
    assert claude_section(manifest).model == "claude-sonnet-4-5-20250929"
    assert manifest.lifecycle.timeout_seconds == 24 * 3600
    assert manifest.lifecycle.failure_action == "destroy"


def test_github_manifest_from_the_quick_reference_is_accepted():
    manifest = parse(BUG_FIX)
    assert claude_section(manifest).mcp_config.mcpServers["github"].env == {"GITHUB_TOKEN": "${GITHUB_TOKEN}"}
    assert manifest.vm.allowed_hosts == ("api.github.com",)
    assert manifest.secrets[0].source == "env"


def test_audit_manifest_from_the_quick_reference_is_accepted():
    assert claude_section(parse(AUDIT)).allowed_tools == ("Read", "Bash", "Grep", "Write")


def test_large_manifest_from_the_quick_reference_is_accepted():
    assert parse(LARGE).vm.disk == "100G"


def test_explicit_defaults_are_equivalent_to_omitted_fields():
    text = MINIMAL + (
        "  headless: true\n  skip_permissions: true\n  output_format: stream-json\n  allowed_tools: null\n"
        "vm: {disk: 40G, network_mode: isolated, allowed_hosts: []}\nsecrets: []\n"
        "lifecycle: {failure_action: destroy, budget_usd: null, retries: 0, resume: false}\n"
    )
    assert parse(text) == parse(MINIMAL)


@pytest.mark.parametrize("version", ['"1"', "1", "'1'", "!!str 1"])
def test_version_is_accepted_with_and_without_quotes(version):
    assert parse(MINIMAL.replace('"1"', version)) == parse(MINIMAL)


def test_json_and_wrapped_manifests_are_equivalent_to_yaml():
    manifest = to_builtins(parse(MINIMAL))
    for body in (manifest, {"manifest": manifest}, {"manifest_yaml": MINIMAL}):
        assert parse_manifest(json.dumps(body).encode(), is_json=True) == parse(MINIMAL)


def test_manifest_is_unchanged_by_journal_encoding_and_decoding():
    manifest = parse(MINIMAL)
    assert msgspec.json.decode(encode_json(manifest), type=Manifest, dec_hook=decode_manifest) == manifest


def test_json_without_its_content_type_is_parsed():
    body = json.dumps({"manifest": to_builtins(parse(MINIMAL)) | {"metadata": {"name": "🚀 \t".strip()}}})
    assert "\\ud83d" in body
    assert parse_manifest(body.encode(), is_json=False).metadata.name == "🚀"


def test_flow_style_yaml_is_accepted():
    flow = (
        "{version: '1', kind: Task, metadata: {name: x}, "
        "repository: {url: 'git@git.example:r.git', branch: main}, claude: {prompt: x}}"
    )
    assert parse(flow).repository.url == "git@git.example:r.git"


def test_null_field_is_equivalent_to_an_absent_field():
    text = MINIMAL + "vm:\n  cpus:\n  memory: ~\nlifecycle: null\n"
    assert parse(text) == parse(MINIMAL)


@pytest.mark.parametrize(
    "prompt", ["/init", "-rf", "#x", "!x", "yes", "1:30", "2026-01-29", "on", "@a", "a\nb", "🙂", "010 x"]
)
def test_prompt_is_always_parsed_as_text(prompt):
    assert (
        parse(MINIMAL.replace('"Your instructions here"', json.dumps(prompt, ensure_ascii=False))).agent.prompt
        == prompt
    )


@pytest.mark.parametrize("text", ["yes", "no", "on", "off", "y", "1:30", "2026-01-29", "1_000", "0b1", "=", "1.2.3"])
def test_keywords_of_yaml_1_1_are_parsed_as_text(text):
    assert parse(MINIMAL.replace('"My Task"', text)).metadata.name == text


@pytest.mark.parametrize(("number", "cpus"), [("16", 16), ("0x10", 16), ("0o20", 16), ("+16", 16), ("016", 16)])
def test_integers_follow_the_yaml_core_schema(number, cpus):
    assert parse(MINIMAL + f"vm: {{cpus: {number}}}\n").vm.cpus == cpus


def test_aliases_are_expanded():
    text = MINIMAL.replace('name: "My Task"', "name: &n x\n  labels: {a: *n, b: *n}")
    assert parse(text).metadata.labels == {"a": "x", "b": "x"}


@pytest.mark.parametrize(
    "url",
    [
        "https://github.com/org/repo.git",
        "http://localhost:3000/r",
        "ssh://git@git.example:2222/org/repo",
        "ssh://git.example/r",
        "git@git.example:org/repo.git",
        "https://[2001:db8::1]:8443/r.git",
        "ssh://git@[::ffff:192.0.2.1]/r.git",
    ],
)
def test_valid_repository_url_is_accepted(url):
    assert parse(MINIMAL.replace("https://github.com/org/repo.git", url)).repository.url == url


@pytest.mark.parametrize("branch", ["main", "feature/x-1", "release_2.0", "üm", "a@b", "dependabot/npm/a+b"])
def test_valid_branch_is_accepted(branch):
    assert parse(MINIMAL.replace('"main"', json.dumps(branch, ensure_ascii=False))).repository.branch == branch


@pytest.mark.parametrize("name", ["東京\u3000タスク", "👩\u200d💻 fixes it", "l\u2019été\u00a0!", "x" * 256])
def test_name_in_any_language_is_accepted(name):
    assert parse(MINIMAL.replace('"My Task"', f'"{name}"')).metadata.name == name


@pytest.mark.parametrize("task_id", ["a", "task-001", "A.b_c-9", "x" * 128, ""])
def test_valid_task_id_is_accepted(task_id):
    assert parse(MINIMAL.replace('"My Task"', f'x\n  id: "{task_id}"')).metadata.id == task_id


def test_every_field_can_be_set():
    text = MINIMAL.replace('"My Task"', "x\n  labels: {team: platform, app.example/tier: db}").replace(
        'branch: "main"', "branch: main\n  commit: 0123abc\n  subpath: services/api"
    )
    text += "  model: claude-opus\n  max_turns: 5\nvm: {cpus: 2, memory: 512M}\n"
    text += "lifecycle: {timeout: 90s, artifact_patterns: ['**/*.md', out/], hang_timeout: 1h, stage_timeout: 5m,\n"
    text += "  provision_timeout: 30s, collect_timeout: 168h}\n"
    manifest = parse(text)
    assert manifest.metadata.labels == {"team": "platform", "app.example/tier": "db"}
    assert (manifest.repository.commit, manifest.repository.subpath) == ("0123abc", "services/api")
    assert (claude_section(manifest).model, claude_section(manifest).max_turns) == ("claude-opus", 5)
    assert manifest.vm.memory_bytes == 512 * 1024**2
    assert manifest.lifecycle.artifact_patterns == ("**/*.md", "out/")
    assert (manifest.lifecycle.timeout_seconds, manifest.lifecycle.collect_timeout_seconds) == (90, 168 * 3600)
    assert (manifest.lifecycle.stage_timeout_seconds, manifest.lifecycle.hang_timeout_seconds) == (300, 3600)
    assert manifest.lifecycle.provision_timeout_seconds == 30
