"""Journal records round-trip."""

import tempfile
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doubles.manifests import claude
from sandbox.agents.claude_code.manifest_section import McpConfig, McpServer
from sandbox.journal.journals import FileJournals
from sandbox.model import events as e
from sandbox.model.artifacts import Artifact
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.manifest.schema import Manifest, Metadata, Repository
from sandbox.model.task_state import TaskState

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
ids = st.from_regex(r"[a-z2-7]{12}", fullmatch=True)
names = words.filter(lambda word: word not in {"", ".", ".."} and not set(word) & {"/", "\0"})
counts = st.integers(0, 2**53)
times = st.datetimes(datetime(1970, 1, 1), datetime(9000, 12, 31), timezones=st.just(UTC))
checksums = st.from_regex(r"sha256:[0-9a-f]{64}", fullmatch=True)
failures = st.builds(Failure, st.sampled_from(FailureCode), words)
results = st.dictionaries(
    words, st.recursive(st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | words, st.lists)
)
manifests = st.builds(
    Manifest,
    metadata=st.builds(Metadata, name=words, labels=st.dictionaries(words, words)),
    repository=st.builds(Repository, url=words, branch=words, commit=st.none() | words),
    agent=st.builds(
        claude,
        prompt=words,
        allowed_tools=st.none() | st.lists(words).map(tuple),
        mcp_config=st.none()
        | st.builds(McpConfig, mcpServers=st.dictionaries(words, st.builds(McpServer, command=words))),
    ),
)
streams = st.sampled_from(["stdout", "stderr"])
events = st.one_of(
    st.builds(e.TaskSubmitted, words, manifests),
    st.builds(e.AttemptStarted, ids, words, words, words),
    st.builds(e.Output.from_bytes, streams, st.binary() | words.map(str.encode), is_continued=st.booleans()),
    st.builds(e.ToolCallEnded, words, words, counts, st.booleans()),
    st.builds(e.Usage, words, counts, counts, counts, counts, st.none() | st.floats(0, 1e6)),
    st.builds(
        e.Progress, counts, counts, st.none() | words, st.none() | times, counts, counts, counts, st.floats(0, 1e6)
    ),
    st.builds(e.EgressDenied, words, counts, words),
    st.builds(e.CancelRequested, words, st.booleans()),
    st.builds(e.AttemptFailed, failures),
    st.builds(e.AgentExited, st.none() | st.integers(0, 255), st.none() | results, st.none() | failures),
    st.builds(e.ArtifactCollected, st.builds(Artifact, names, words, counts, words, checksums, st.booleans())),
    st.just(e.TaskFinished()),
)
transitions = st.none() | st.builds(
    e.Transition, st.none() | st.sampled_from(TaskState), st.sampled_from(TaskState), words
)


@given(st.lists(st.tuples(events, transitions, times), max_size=12), st.integers(1, 4000))
@settings(max_examples=30, deadline=None)
def test_records_round_trip(entries, bytes_max):
    with tempfile.TemporaryDirectory() as directory:
        journals = FileJournals(Path(directory))
        writer = journals.create("task-1")
        written = [writer.append(event, transition, at=at) for event, transition, at in entries]
        writer.close()

        records, offset = [], 0
        while (batch := journals.read("task-1", offset, bytes_max=bytes_max)).records:
            records += batch.records
            offset = batch.next_offset

        assert records == written
        assert [record.seq for record in records] == list(range(1, len(entries) + 1))
        assert [(record.event, record.transition, record.at) for record in records] == entries


@pytest.mark.parametrize(
    "data", [b"", b"plain\n", b"\xff\x00\xfe\n", "é\U0001f600\u2028\x00\r\n".encode(), b"\xed\xa0\x80"]
)
def test_output_bytes_are_preserved_exactly(tmp_path, data):
    journals = FileJournals(tmp_path)
    writer = journals.create("task-1")
    writer.append(e.Output.from_bytes("stdout", data), at=datetime.now(UTC))
    writer.close()

    [record] = journals.read("task-1").records

    assert record.event.data == data


def test_times_are_stored_in_utc(tmp_path):
    journals = FileJournals(tmp_path)
    writer = journals.create("task-1")
    noon = datetime(2026, 1, 29, 12, tzinfo=timezone(timedelta(hours=2)))
    writer.append(e.TaskFinished(), at=noon)
    writer.close()

    [record] = journals.read("task-1").records

    assert record.at.isoformat() == "2026-01-29T10:00:00+00:00"
