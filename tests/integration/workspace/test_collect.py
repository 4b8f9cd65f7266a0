"""Files that match a task's patterns become artifacts, and no others do."""

import asyncio
import hashlib
import os
import subprocess
import tracemalloc
from pathlib import Path

import pytest

from sandbox.interfaces.workspace import SkippedFile
from sandbox.model.events import Artifact
from sandbox.model.failure import AttemptError
from sandbox.workspace import collect as workspace_collect
from sandbox.workspace import files
from sandbox.workspace.collect import TEMPORARY_FILE_NAME
from sandbox.workspace.files import RootedFiles
from sandbox.workspace.workspaces import GitWorkspaces


class CollectEnv:
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
def env(tmp_path):
    return CollectEnv(tmp_path)


def test_files_in_the_top_level_sandbox_directory_are_not_collected(env):
    for name in (
        ".sandbox/metadata.json",
        ".sandbox/SHA256SUMS",
        "deep/.sandbox/metadata.json",
        ".config/settings.json",
    ):
        env.file(name).write_text("{}")

    assert env.paths("**/.*/**", ".sandbox/", ".sandbox/*.json") == [
        ".config/settings.json",
        "deep/.sandbox/metadata.json",
    ]


def test_artifact_has_name_size_type_and_checksum(env):
    env.file("out/report.json").write_bytes(b"{}\n")

    assert env.collect("out/*.json") == [
        Artifact(
            name="report.json",
            path="out/report.json",
            size_bytes=3,
            content_type="application/json",
            checksum="sha256:" + hashlib.sha256(b"{}\n").hexdigest(),
        )
    ]
    assert (env.target / "report.json").read_bytes() == b"{}\n"
    assert env.stored == ["report.json"]


def test_nothing_is_collected_without_patterns_or_matches(env):
    env.file("a").touch()

    assert env.collect() == []
    assert env.collect("b", "a/b", "*/a") == []


def test_files_are_sorted_by_path_without_duplicates(env):
    for name in ("b/x.txt", "a/x.txt", "c.txt", "a/b/x.txt"):
        env.file(name).touch()

    assert env.paths("**/*.txt", "*.txt", "a/**") == ["a/b/x.txt", "a/x.txt", "b/x.txt", "c.txt"]


def test_artifact_names_are_unique(env):
    for name in ("a/x.txt", "b/x.txt", "b__x.txt", "metadata.json", "a.b/metadata.json"):
        env.file(name).touch()

    items = env.collect("**", taken=frozenset({"metadata.json"}))

    assert {item.path: item.name for item in items} == {
        "a.b/metadata.json": "a.b__metadata.json",
        "a/x.txt": "x.txt",
        "b/x.txt": "b__x.txt",
        "b__x.txt": "b__x-2.txt",
        "metadata.json": "metadata-2.json",
    }
    assert len(env.stored) == 5


def test_file_named_like_the_temporary_file_is_collected(env):
    env.file("a/.sandbox.part").write_text("mine")
    env.file("z").write_text("z")

    items = env.collect("a/.*", "z")

    assert [item.name for item in items] == ["a__.sandbox.part", "z"]
    assert (env.target / "a__.sandbox.part").read_text() == "mine"


def test_top_level_git_directory_is_excluded(env):
    env.file(".git/config").touch()
    env.file("nested/.git/config").touch()

    assert env.paths(".git/*", ".git/**", "**/.git/*") == ["nested/.git/config"]


def test_only_regular_files_are_collected_and_links_are_not_followed(env, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    env.file("link.txt").symlink_to(outside / "secret.txt")
    env.file("dangling.txt").symlink_to("nowhere")
    env.file("directory").symlink_to(outside)
    os.mkfifo(env.file("pipe.txt"))
    env.file("folder.txt").mkdir()
    env.file("real.txt").write_text("real")
    os.link(env.file("real.txt"), env.file("twin.txt"))

    items = env.collect("*.txt", "directory/*", "**/secret.txt")

    assert [item.path for item in items if isinstance(item, Artifact)] == ["real.txt", "twin.txt"]
    assert [item for item in items if isinstance(item, SkippedFile)] == [
        SkippedFile("dangling.txt", "it is not a regular file"),
        SkippedFile("link.txt", "it is not a regular file"),
        SkippedFile("pipe.txt", "it is not a regular file"),
    ]
    assert all(b"secret" not in path.read_bytes() for path in env.target.iterdir())


def test_unprintable_names_are_percent_encoded(env):
    for name in ("line\nbreak", "\udcff", "right\u202eto-left", "ünï"):
        env.file(name).touch()

    assert env.paths("*") == ["line%0Abreak", "right%E2%80%AEto-left", "ünï", "%FF"]


def test_files_above_the_size_limit_are_skipped(env, monkeypatch):
    monkeypatch.setattr(workspace_collect, "ARTIFACT_BYTES_MAX", 100)
    for name, size in {"a": 60, "b": 60, "c": 40, "d": 1}.items():
        env.file(name).write_bytes(b"x" * size)
    os.truncate(env.file("b"), 2**40)

    items = env.collect("*")

    assert [item.path for item in items if isinstance(item, Artifact)] == ["a", "c"]
    assert [item.path for item in items if isinstance(item, SkippedFile)] == ["b", "d"]
    assert "1099511627776 bytes the matching files" in items[1].reason


def test_files_above_the_count_limit_are_skipped_and_reported(env, monkeypatch):
    monkeypatch.setattr(workspace_collect, "ARTIFACTS_MAX", 3)
    for number in range(6):
        env.file(f"f{number}").touch()

    items = env.collect("*")

    assert [type(item) for item in items] == [Artifact, Artifact, Artifact, SkippedFile]
    assert items[-1] == SkippedFile("f3", "and 2 more: over 3 files")


def test_total_length_of_printed_paths_is_limited(env, monkeypatch):
    monkeypatch.setattr(workspace_collect, "ARTIFACT_PATHS_BYTES_MAX", 2000)
    for number in range(6):
        env.file(f"{chr(0xDCFF) * 200}{number}").touch()  # 601 bytes after percent-encoding
    for number in range(12):
        os.mkfifo(env.file(f"{'p' * 200}{number:02}"))

    items = env.collect("?*")

    assert [item.path[-4:] for item in items if isinstance(item, Artifact)] == ["%FF0", "%FF1", "%FF2"]
    skipped = [item for item in items if isinstance(item, SkippedFile)]
    assert sum(item.reason == "it is not a regular file" for item in skipped) == 10
    assert skipped[-1].reason == "and 2 more: over 2000 bytes of paths"


def test_many_files_with_ordinary_paths_are_all_collected(env):
    for number in range(1000):
        env.file(f"reports/unit/{number:0120}.xml").touch()

    assert all(isinstance(item, Artifact) for item in env.collect("reports/**"))


def test_files_found_before_the_entry_limit_are_stored(env, monkeypatch):
    monkeypatch.setattr(files, "ENTRIES_MAX", 5)
    env.file("report").touch()
    for number in range(10):
        env.file(f"many/f{number}").touch()

    items = env.collect("report", "many/*")

    assert [item.path for item in items] == ["report", "."]
    assert items[-1].reason == "there are more than 5 files, and only the first were examined; narrow the patterns"


def test_total_path_length_is_limited(env, monkeypatch):
    monkeypatch.setattr(files, "PATHS_BYTES_MAX", 1024**2)
    env.file("report").touch()
    for number in range(1000):
        env.file(f"{'d' * 200}/{'e' * 200}/{'f' * 200}/{'g' * 200}/{'h' * 200}/{number:0200}").touch()

    assert [item.path for item in env.collect("report")] == ["report"]
    many = env.collect("report", "**/*")
    assert [item.path for item in many[-1:]] == ["."]
    assert "1 MiB of paths" in many[-1].reason


def test_directory_entries_use_little_memory(env):
    for number in range(1000):
        env.file(f"many/{number}").touch()
    tracemalloc.start()
    with RootedFiles(env.workspace) as rooted:
        entries = rooted.entries(b"many")
        size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(entries) == 1000
    assert size / 1000 < 400


def test_deeply_nested_directories_are_skipped(env):
    directory = os.open(env.workspace, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("deep", dir_fd=directory)
        inner = os.open("deep", os.O_RDONLY, dir_fd=directory)
        os.close(directory)
        directory = inner
    os.close(directory)
    env.file("deep/x.txt").touch()

    items = env.collect("**/x.txt")

    subprocess.run(["rm", "-rf", str(env.workspace)], check=True)
    assert items[0].path == "deep/x.txt"
    assert items[1].reason == "the directory is nested too deeply"
    assert len(items) == 2


def test_directories_without_possible_matches_are_not_searched(env, listed_directories):
    env.file("out/report.txt").touch()
    env.file("out/below/x.txt").touch()
    env.file("node_modules/a/b.txt").touch()

    assert env.paths("out/*.txt") == ["out/report.txt"]

    assert b"node_modules" not in listed_directories
    assert b"out" in listed_directories


def test_missing_workspace_is_reported(env):
    env.workspace.rmdir()

    (skipped,) = env.collect("*")

    assert isinstance(skipped, SkippedFile)
    assert "could not be read" in skipped.reason


def test_unwritable_target_fails_the_collection(env):
    env.file("a").touch()
    env.target.rmdir()

    with pytest.raises(AttemptError, match="a could not be stored") as raised:
        env.collect("a")

    assert raised.value.code == "collect_failed"


def test_cancellation_stops_between_files(env):
    for number in range(200):
        env.file(f"f{number}").write_bytes(b"x" * 100)

    async def cancel_after_the_first():
        workspaces = GitWorkspaces({"PATH": os.environ["PATH"]})
        first = asyncio.Event()

        async def collect():
            async for _item in workspaces.collect(env.workspace, ["*"], env.target, frozenset()):
                first.set()

        collecting = asyncio.create_task(collect())
        await first.wait()
        collecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await collecting

    asyncio.run(cancel_after_the_first())

    assert 1 <= len(env.stored) < 200


def test_cancellation_leaves_no_partial_file(env):
    with env.file("big").open("wb") as file:
        file.truncate(1024**3)
    part = env.target / TEMPORARY_FILE_NAME

    async def cancel_during_copy():
        workspaces = GitWorkspaces({"PATH": os.environ["PATH"]})

        async def collect():
            async for _item in workspaces.collect(env.workspace, ["*"], env.target, frozenset()):
                pass

        collecting = asyncio.create_task(collect())
        async with asyncio.timeout(20):
            while not part.exists() or not part.stat().st_size:
                await asyncio.sleep(0.001)
        collecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await collecting

    asyncio.run(cancel_during_copy())

    assert env.stored == []
