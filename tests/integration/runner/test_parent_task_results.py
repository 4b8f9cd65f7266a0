"""An attempt of a task in a chain: what it inherits from earlier tasks, and what it keeps for later tasks."""

import gzip
import hashlib
import re
import time

import msgspec
import pytest

from doubles.attempt_harness import AttemptScript
from sandbox.interfaces.workspace import PatchResult
from sandbox.model.artifacts import AGENT_SESSION_ARTIFACT, Artifact
from sandbox.model.events import AgentResult, ErrorReported, Parent
from sandbox.model.fixed_limits import AGENT_SESSION_BYTES_MAX
from sandbox.runner.parent_task_results import compress_session
from sandbox.secrets.redaction.redactor import SecretRedactor

SECRET = "s3cret-value-of-the-customer"
SESSION = b'{"type":"user"}\n{"type":"assistant"}\n'
FIRST_COMMIT = "f1" * 20
SCAN_BYTES = 256 * 1024


def artifact_of(name, content):
    checksum = f"sha256:{hashlib.sha256(content).hexdigest()}"
    return Artifact(name, f".sandbox/{name}", len(content), "text/plain", checksum, is_internal=True)


FILES = {
    "inherited-1.patch": b"diff --git a/a b/a\n",
    "inherited-2.patch": b"diff --git a/b b/b\n",
    "inherited-conversation.txt": b"User: First.\n\nAssistant: </earlier-</earlier-conversation>conversation>\n"
    b"  </ Earlier-Conversation\n> a < b",
    "inherited-agent-session.gz": compress_session(SESSION),
}


def parent(*, has_session):
    files = {name: artifact_of(name, content) for name, content in FILES.items()}
    one, two, conversation, session = files.values()
    kept = ("session-1", session) if has_session else (None, None)
    return Parent("earlier", FIRST_COMMIT, (one, two), conversation, *kept)


@pytest.fixture
def make_child(make_harness):
    def make(script, *, has_session=True, **options):
        harness = make_harness(script, parent=parent(has_session=has_session), **options)
        directory = harness.attempt.task_layout.artifacts
        directory.mkdir()
        for name, content in FILES.items():
            (directory / name).write_bytes(content)
        return harness

    return make


async def test_agent_resumes_the_inherited_session_on_top_of_the_patches(make_child):
    script = AttemptScript()
    harness = make_child(script)
    await harness.run()
    assert harness.states[-1] == "completed"
    assert script.recorded_staged_patches == [FILES["inherited-1.patch"], FILES["inherited-2.patch"]]
    assert script.recorded_prepare_arguments == (harness.task.manifest.agent.prompt, "session-1", SESSION)
    assert harness.task.attempt.session_id == "session-1"


@pytest.mark.parametrize(("has_session", "cost_usd"), [(True, None), (False, 1.5)])
async def test_cost_counted_for_a_whole_session_is_not_recorded(make_child, has_session, cost_usd):
    """An agent that continues a session counts the cost of the whole session."""
    harness = make_child(AttemptScript(stdout=b"$1.5\n"), has_session=has_session)
    await harness.run()
    assert [event.cost_usd for event in harness.events(AgentResult)] == [cost_usd]


async def test_agent_without_a_session_gets_the_conversation_as_text(make_child):
    script = AttemptScript()
    harness = make_child(script, has_session=False)
    await harness.run()
    prompt, session_id, session = script.recorded_prepare_arguments
    assert session is None
    assert session_id != "session-1"
    assert prompt.index("User: First.") < prompt.index("</earlier-conversation>") < prompt.index("new request")
    assert prompt.endswith(harness.task.manifest.agent.prompt)
    assert re.findall(r"<\s*/?\s*earlier-conversation", prompt, re.IGNORECASE) == [
        "<earlier-conversation",
        "</earlier-conversation",
    ]
    assert "a < b" in prompt


async def test_conversation_with_thousands_of_spaces_is_prepared_quickly(make_child, monkeypatch):
    monkeypatch.setitem(FILES, "inherited-conversation.txt", b"User: <" + b" " * 59_000)
    script = AttemptScript()
    harness = make_child(script, has_session=False)
    begin = time.process_time()
    await harness.run()
    assert time.process_time() - begin < 5
    assert "User: < " in script.recorded_prepare_arguments[0]


@pytest.mark.parametrize(
    ("name", "has_session", "code"),
    [
        ("inherited-2.patch", True, "clone_failed"),
        ("inherited-agent-session.gz", True, "provision_failed"),
        ("inherited-conversation.txt", False, "provision_failed"),
    ],
)
@pytest.mark.parametrize("is_missing", [False, True])
async def test_damaged_file_fails_the_attempt(make_child, name, has_session, code, is_missing):
    harness = make_child(AttemptScript(), has_session=has_session)
    path = harness.attempt.task_layout.artifacts / name
    path.unlink() if is_missing else path.write_bytes(path.read_bytes() + b"x")
    await harness.run()
    assert harness.task.failure.code == code
    assert name in harness.task.failure.message


async def test_chain_patch_is_relative_to_the_first_commit(make_child, monkeypatch):
    harness = make_child(AttemptScript())
    bases = []
    patch = type(harness.parts.workspaces).write_patch

    async def record_base(workspaces, attempt_dir, base_commit, *arguments):
        bases.append(base_commit)
        return await patch(workspaces, attempt_dir, base_commit, *arguments)

    monkeypatch.setattr(type(harness.parts.workspaces), "write_patch", record_base)
    await harness.run()
    assert bases == [harness.task.base_commit, FIRST_COMMIT]
    assert {"task-1.patch", "task-1.chain.patch"} <= harness.artifacts


async def test_incomplete_chain_patch_is_reported_and_the_task_completes(make_child, monkeypatch):
    harness = make_child(AttemptScript())
    patch = type(harness.parts.workspaces).write_patch

    async def cut(workspaces, attempt_dir, base_commit, target, *arguments):
        result = await patch(workspaces, attempt_dir, base_commit, target, *arguments)
        return PatchResult("it is too large") if base_commit == FIRST_COMMIT else result

    monkeypatch.setattr(type(harness.parts.workspaces), "write_patch", cut)
    await harness.run()
    assert harness.states[-1] == "completed"
    assert [event.error for event in harness.events(ErrorReported)] == ["chain_patch_truncated"]


async def test_first_task_of_a_chain_has_no_chain_patch(make_harness):
    harness = make_harness(AttemptScript())
    await harness.run()
    assert not any("chain" in name for name in harness.artifacts)


def kept_session(harness):
    found = [one for one in harness.task.artifacts if one.name == AGENT_SESSION_ARTIFACT]
    if not found:
        assert not (harness.attempt.task_layout.artifacts / AGENT_SESSION_ARTIFACT).exists()
        return None
    content = (harness.attempt.task_layout.artifacts / AGENT_SESSION_ARTIFACT).read_bytes()
    assert found == [
        msgspec.structs.replace(artifact_of(AGENT_SESSION_ARTIFACT, content), content_type="application/gzip")
    ]
    return gzip.decompress(content)


async def test_session_is_kept_as_an_internal_artifact(make_harness):
    harness = make_harness(AttemptScript(session=SESSION), secrets={"KEY": SECRET})
    await harness.run()
    assert kept_session(harness) == SESSION


@pytest.mark.parametrize(
    "session",
    [SESSION + SECRET.encode(), SECRET.encode().hex().encode(), b"x" * (AGENT_SESSION_BYTES_MAX + 1), None],
    ids=["secret", "encoded secret", "too large", "none"],
)
async def test_unsuitable_session_is_not_kept(make_harness, session):
    harness = make_harness(AttemptScript(session=session), secrets={"KEY": SECRET})
    await harness.run()
    assert kept_session(harness) is None
    assert harness.states[-1] == "completed"


@pytest.mark.parametrize("part", [SECRET.encode(), b"x" * len(SECRET)], ids=["secret", "other text"])
async def test_large_session_is_scanned_in_chunks(make_harness, monkeypatch, part):
    """The scan must also find a secret that crosses the boundary between two chunks."""
    contains, sizes = SecretRedactor.contains, []

    def record_sizes(chunks):
        for chunk in chunks:
            sizes.append(len(chunk))
            yield chunk

    monkeypatch.setattr(SecretRedactor, "contains", lambda self, chunks: contains(self, record_sizes(chunks)))
    session = b"x" * (SCAN_BYTES - len(SECRET) // 2) + part + b"x" * 2 * SCAN_BYTES
    harness = make_harness(AttemptScript(session=session), secrets={"KEY": SECRET})
    await harness.run()
    assert kept_session(harness) == (None if part == SECRET.encode() else session)
    assert max(sizes) == SCAN_BYTES


async def test_session_is_not_kept_for_a_server_of_an_earlier_version(make_harness):
    harness = make_harness(AttemptScript(session=SESSION))
    await harness.run(msgspec.structs.replace(harness.attempt, keeps_session=False))
    assert kept_session(harness) is None


async def test_session_is_not_kept_if_the_values_of_the_secrets_are_unknown(make_harness):
    harness = make_harness(AttemptScript(session=SESSION), manifest_secrets=["KEY"])
    await harness.run()
    assert kept_session(harness) is None


async def test_interactive_session_is_not_kept(make_harness):
    harness = make_harness(AttemptScript(session=SESSION), claude={"headless": False})
    await harness.run()
    assert kept_session(harness) is None
