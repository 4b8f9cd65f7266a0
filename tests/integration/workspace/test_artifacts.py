"""Files that match a task's patterns become artifacts. No other files do."""

import asyncio
import hashlib
import os
import subprocess
import tracemalloc
from pathlib import Path

import pytest

from sandbox.interfaces.workspace import SkippedFile
from sandbox.model.artifacts import Artifact
from sandbox.model.failure import AttemptError
from sandbox.workspace import artifacts as workspace_artifacts
from sandbox.workspace import rooted_files
from sandbox.workspace.artifacts import TEMPORARY_FILE_NAME
from sandbox.workspace.rooted_files import RootedFiles
from sandbox.workspace.workspaces import GitWorkspaces


class CollectHarness:
    """A workspace and a directory for its artifacts."""

    def __init__(self, root: Path) -> None:
        self.workspace = root / "workspace"
        self.target = root / "artifacts"
        self.workspace.mkdir()
        self.target.mkdir()

    def file(self, name: str) -> Path:
        path = self.workspace / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def stored(self) -> list[str]:
        return sorted(path.name for path in self.target.iterdir())

    def collect(self, *patterns: str, taken: frozenset[str] = frozenset()) -> list[Artifact | SkippedFile]:
        async def collect_all() -> list[Artifact | SkippedFile]:
            workspaces = GitWorkspaces({"PATH": os.environ["PATH"]})
            return [item async for item in workspaces.collect(self.workspace, patterns, self.target, taken)]

        return asyncio.run(collect_all())

    def paths(self, *patterns: str) -> list[str]:
        return [item.path for item in self.collect(*patterns) if isinstance(item, Artifact)]


@pytest.fixture
def harness(tmp_path):
    return CollectHarness(tmp_path)


def test_files_in_the_top_level_sandbox_directory_are_not_collected(harness):
    for name in (
        ".sandbox/metadata.json",
        ".sandbox/SHA256SUMS",
        "deep/.sandbox/metadata.json",
        ".config/settings.json",
    ):
        harness.file(name).write_text("{}")

    assert harness.paths("**/.*/**", ".sandbox/", ".sandbox/*.json") == [
        ".config/settings.json",
        "deep/.sandbox/metadata.json",
    ]


def test_artifact_metadata_is_complete(harness):
    harness.file("out/report.json").write_bytes(b"{}\n")

    assert harness.collect("out/*.json") == [
        Artifact(
            name="report.json",
            path="out/report.json",
            size_bytes=3,
            content_type="application/json",
            checksum="sha256:" + hashlib.sha256(b"{}\n").hexdigest(),
        )
    ]
    assert (harness.target / "report.json").read_bytes() == b"{}\n"
    assert harness.stored == ["report.json"]


def test_nothing_is_collected_without_patterns_or_matches(harness):
    harness.file("a").touch()

    assert harness.collect() == []
    assert harness.collect("b", "a/b", "*/a") == []


def test_files_are_sorted_by_path_without_duplicates(harness):
    for name in ("b/x.txt", "a/x.txt", "c.txt", "a/b/x.txt"):
        harness.file(name).touch()

    assert harness.paths("**/*.txt", "*.txt", "a/**") == ["a/b/x.txt", "a/x.txt", "b/x.txt", "c.txt"]


def test_artifact_names_are_unique(harness):
    for name in ("a/x.txt", "b/x.txt", "b__x.txt", "metadata.json", "a.b/metadata.json"):
        harness.file(name).touch()

    items = harness.collect("**", taken=frozenset({"metadata.json"}))

    assert {item.path: item.name for item in items} == {
        "a.b/metadata.json": "a.b__metadata.json",
        "a/x.txt": "x.txt",
        "b/x.txt": "b__x.txt",
        "b__x.txt": "b__x-2.txt",
        "metadata.json": "metadata-2.json",
    }
    assert len(harness.stored) == 5


def test_file_named_like_the_temporary_file_is_collected(harness):
    harness.file("a/.sandbox.part").write_text("mine")
    harness.file("z").write_text("z")

    items = harness.collect("a/.*", "z")

    assert [item.name for item in items] == ["a__.sandbox.part", "z"]
    assert (harness.target / "a__.sandbox.part").read_text() == "mine"


def test_top_level_git_directory_is_excluded(harness):
    harness.file(".git/config").touch()
    harness.file("nested/.git/config").touch()

    assert harness.paths(".git/*", ".git/**", "**/.git/*") == ["nested/.git/config"]


def test_only_regular_files_are_collected_and_links_are_not_followed(harness, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    harness.file("link.txt").symlink_to(outside / "secret.txt")
    harness.file("dangling.txt").symlink_to("nowhere")
    harness.file("directory").symlink_to(outside)
    os.mkfifo(harness.file("pipe.txt"))
    harness.file("folder.txt").mkdir()
    harness.file("real.txt").write_text("real")
    os.link(harness.file("real.txt"), harness.file("twin.txt"))

    items = harness.collect("*.txt", "directory/*", "**/secret.txt")

    assert [item.path for item in items if isinstance(item, Artifact)] == ["real.txt", "twin.txt"]
    assert [item for item in items if isinstance(item, SkippedFile)] == [
        SkippedFile("dangling.txt", "it is not a regular file"),
        SkippedFile("link.txt", "it is not a regular file"),
        SkippedFile("pipe.txt", "it is not a regular file"),
    ]
    assert all(b"secret" not in path.read_bytes() for path in harness.target.iterdir())


def test_unprintable_names_are_percent_encoded(harness):
    for name in ("line\nbreak", "\udcff", "right\u202eto-left", "ünï", "a\u3164", "b\u2800", "c\ufe0f", "报告"):
        harness.file(name).touch()

    assert harness.paths("*") == [
        *("a%E3%85%A4", "b%E2%A0%80", "c%EF%B8%8F", "line%0Abreak", "right%E2%80%AEto-left", "ünï", "报告", "%FF"),
    ]


def test_files_above_the_size_limit_are_skipped(harness, monkeypatch):
    monkeypatch.setattr(workspace_artifacts, "MATCHED_FILES_BYTES_MAX", 100)
    for name, size in {"a": 60, "b": 60, "c": 40, "d": 1}.items():
        harness.file(name).write_bytes(b"x" * size)
    os.truncate(harness.file("b"), 2**40)

    items = harness.collect("*")

    assert [item.path for item in items if isinstance(item, Artifact)] == ["a", "c"]
    assert [item.path for item in items if isinstance(item, SkippedFile)] == ["b", "d"]
    assert "1099511627776 bytes, the matching files" in items[1].reason


def test_files_above_the_count_limit_are_skipped_and_reported(harness, monkeypatch):
    monkeypatch.setattr(workspace_artifacts, "ARTIFACTS_MAX", 3)
    for number in range(6):
        harness.file(f"f{number}").touch()

    items = harness.collect("*")

    assert [type(item) for item in items] == [Artifact, Artifact, Artifact, SkippedFile]
    assert items[-1] == SkippedFile("f3", "this file and 2 more exceed the limit of 3 files")


def test_total_length_of_printed_paths_is_limited(harness, monkeypatch):
    monkeypatch.setattr(workspace_artifacts, "ARTIFACT_PATHS_BYTES_MAX", 2000)
    for number in range(6):
        harness.file(f"{chr(0xDCFF) * 200}{number}").touch()  # 601 bytes after percent-encoding
    for number in range(12):
        os.mkfifo(harness.file(f"{'p' * 200}{number:02}"))

    items = harness.collect("?*")

    assert [item.path[-4:] for item in items if isinstance(item, Artifact)] == ["%FF0", "%FF1", "%FF2"]
    skipped = [item for item in items if isinstance(item, SkippedFile)]
    assert sum(item.reason == "it is not a regular file" for item in skipped) == 10
    assert skipped[-1].reason == "this file and 2 more exceed the limit of 2000 bytes of paths"


def test_many_files_with_ordinary_paths_are_all_collected(harness):
    for number in range(1000):
        harness.file(f"reports/unit/{number:0120}.xml").touch()

    assert all(isinstance(item, Artifact) for item in harness.collect("reports/**"))


def test_files_found_before_the_entry_limit_are_stored(harness, monkeypatch):
    monkeypatch.setattr(rooted_files, "ENTRIES_MAX", 5)
    harness.file("report").touch()
    for number in range(10):
        harness.file(f"many/f{number}").touch()

    items = harness.collect("report", "many/*")

    assert [item.path for item in items] == ["report", "."]
    assert items[-1].reason == "there are more than 5 files, and the rest were not examined; narrow the patterns"


def test_total_length_of_the_searched_paths_is_limited(harness, monkeypatch):
    monkeypatch.setattr(rooted_files, "PATHS_BYTES_MAX", 1024**2)
    harness.file("report").touch()
    for number in range(1000):
        harness.file(f"{'d' * 200}/{'e' * 200}/{'f' * 200}/{'g' * 200}/{'h' * 200}/{number:0200}").touch()

    assert [item.path for item in harness.collect("report")] == ["report"]
    many = harness.collect("report", "**/*")
    assert [item.path for item in many[-1:]] == ["."]
    assert "1 MiB of paths" in many[-1].reason


def test_directory_entries_use_little_memory(harness):
    for number in range(1000):
        harness.file(f"many/{number}").touch()
    tracemalloc.start()
    with RootedFiles(harness.workspace) as rooted:
        entries = rooted.entries(b"many")
        size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(entries) == 1000
    assert size / 1000 < 400


def test_deeply_nested_directories_are_skipped(harness):
    directory = os.open(harness.workspace, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("deep", dir_fd=directory)
        inner = os.open("deep", os.O_RDONLY, dir_fd=directory)
        os.close(directory)
        directory = inner
    os.close(directory)
    harness.file("deep/x.txt").touch()

    items = harness.collect("**/x.txt")

    subprocess.run(["rm", "-rf", str(harness.workspace)], check=True)
    assert items[0].path == "deep/x.txt"
    assert items[1].reason == "the directory is nested too deeply"
    assert len(items) == 2


def test_directories_without_possible_matches_are_not_searched(harness, listed_directories):
    harness.file("out/report.txt").touch()
    harness.file("out/below/x.txt").touch()
    harness.file("node_modules/a/b.txt").touch()

    assert harness.paths("out/*.txt") == ["out/report.txt"]

    assert b"node_modules" not in listed_directories
    assert b"out" in listed_directories


def test_missing_workspace_is_reported(harness):
    harness.workspace.rmdir()

    (skipped,) = harness.collect("*")

    assert isinstance(skipped, SkippedFile)
    assert "could not be read" in skipped.reason


def test_unwritable_target_fails_the_collection(harness):
    harness.file("a").touch()
    harness.target.rmdir()

    with pytest.raises(AttemptError, match="a could not be stored") as raised:
        harness.collect("a")

    assert raised.value.code == "collect_failed"


async def test_cancellation_stops_between_files(harness):
    for number in range(200):
        harness.file(f"f{number}").write_bytes(b"x" * 100)

    async def cancel_after_the_first():
        workspaces = GitWorkspaces({"PATH": os.environ["PATH"]})
        first = asyncio.Event()

        async def collect():
            async for _item in workspaces.collect(harness.workspace, ["*"], harness.target, frozenset()):
                first.set()

        collecting = asyncio.create_task(collect())
        await first.wait()
        collecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await collecting

    await cancel_after_the_first()

    assert 1 <= len(harness.stored) < 200


async def test_cancellation_leaves_no_partial_file(harness):
    with harness.file("big").open("wb") as file:
        file.truncate(1024**3)
    part = harness.target / TEMPORARY_FILE_NAME

    async def cancel_during_copy():
        workspaces = GitWorkspaces({"PATH": os.environ["PATH"]})

        async def collect():
            async for _item in workspaces.collect(harness.workspace, ["*"], harness.target, frozenset()):
                pass

        collecting = asyncio.create_task(collect())
        async with asyncio.timeout(20):
            while not part.exists() or not part.stat().st_size:
                await asyncio.sleep(0.001)
        collecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await collecting

    await cancel_during_copy()

    assert harness.stored == []


MANY_PATTERNS = [f"**/x{number}/**/b/**/c.log" for number in range(64)]


def test_many_patterns_use_little_memory_for_each_directory(harness):
    for number in range(2000):
        (harness.workspace / str(number)).mkdir()
    harness.file("1000/x7/a/b/c.log").write_text("found\n")
    tracemalloc.start()
    try:
        paths = harness.paths(*MANY_PATTERNS)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert paths == ["1000/x7/a/b/c.log"]
    assert peak_bytes < 5_000_000


def test_pattern_search_with_too_many_states_is_reported(harness, monkeypatch):
    for number in range(200):
        (harness.workspace / f"{number:03}").mkdir()
    for name in ("a.log", "100/x7/b/c.log"):
        harness.file(name).write_text("found\n")
    monkeypatch.setattr(workspace_artifacts, "GLOB_STATES_BYTES_MAX", 200 * 100)
    assert harness.paths("*.log", *MANY_PATTERNS) == ["100/x7/b/c.log", "a.log"]

    monkeypatch.setattr(workspace_artifacts, "GLOB_STATES_BYTES_MAX", 100 * 10)
    *_, skipped = harness.collect("*.log", *MANY_PATTERNS)
    assert isinstance(skipped, SkippedFile)
    assert "narrow the patterns" in skipped.reason
