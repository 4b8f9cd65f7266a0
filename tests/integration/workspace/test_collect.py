"""Files that match a task's patterns become artifacts, and nothing else does."""

import asyncio
import hashlib
import os
import subprocess
import tracemalloc
from pathlib import Path

import pytest

from sandbox.interfaces.workspace import SkippedFile
from sandbox.model.errors import AttemptError
from sandbox.model.events import Artifact
from sandbox.workspace import collect as workspace_collect
from sandbox.workspace import files
from sandbox.workspace.collect import TEMPORARY_FILE_NAME
from sandbox.workspace.files import RootedFiles
from sandbox.workspace.workspaces import GitWorkspaces


class Desk:
    """A workspace and a place for its artifacts."""

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
        async def everything() -> list[Artifact | SkippedFile]:
            workspaces = GitWorkspaces({"PATH": os.environ["PATH"]})
            return [item async for item in workspaces.collect(self.workspace, patterns, self.target, taken)]

        return asyncio.run(everything())

    def paths(self, *patterns: str) -> list[str]:
        return [item.path for item in self.collect(*patterns) if isinstance(item, Artifact)]


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


def test_no_agent_lays_what_looks_like_the_products_own_proof(desk):
    for name in (".sandbox/metadata.json", ".sandbox/SHA256SUMS", "deep/.sandbox/metadata.json", ".config/kept.json"):
        desk.file(name).write_text("{}")

    assert desk.paths("**/.*/**", ".sandbox/", ".sandbox/*.json") == [
        ".config/kept.json",
        "deep/.sandbox/metadata.json",
    ]


def test_an_artifact_is_the_file_with_its_figures(desk):
    desk.file("out/report.json").write_bytes(b"{}\n")

    assert desk.collect("out/*.json") == [
        Artifact(
            name="report.json",
            path="out/report.json",
            size_bytes=3,
            content_type="application/json",
            checksum="sha256:" + hashlib.sha256(b"{}\n").hexdigest(),
        )
    ]
    assert (desk.target / "report.json").read_bytes() == b"{}\n"
    assert desk.stored == ["report.json"]


def test_no_pattern_and_no_match_collect_nothing(desk):
    desk.file("a").touch()

    assert desk.collect() == []
    assert desk.collect("b", "a/b", "*/a") == []


def test_files_come_in_the_order_of_their_paths_each_once(desk):
    for name in ("b/x.txt", "a/x.txt", "c.txt", "a/b/x.txt"):
        desk.file(name).touch()

    assert desk.paths("**/*.txt", "*.txt", "a/**") == ["a/b/x.txt", "a/x.txt", "b/x.txt", "c.txt"]


def test_names_stay_unique(desk):
    for name in ("a/x.txt", "b/x.txt", "b__x.txt", "metadata.json", "a.b/metadata.json"):
        desk.file(name).touch()

    made = desk.collect("**", taken=frozenset({"metadata.json"}))

    assert {item.path: item.name for item in made} == {
        "a.b/metadata.json": "a.b__metadata.json",
        "a/x.txt": "x.txt",
        "b/x.txt": "b__x.txt",
        "b__x.txt": "b__x-2.txt",
        "metadata.json": "metadata-2.json",
    }
    assert len(desk.stored) == 5


def test_a_file_called_like_the_temporary_one_spoils_nothing(desk):
    desk.file("a/.sandbox.part").write_text("mine")
    desk.file("z").write_text("z")

    made = desk.collect("a/.*", "z")

    assert [item.name for item in made] == ["a__.sandbox.part", "z"]
    assert (desk.target / "a__.sandbox.part").read_text() == "mine"


def test_the_git_directory_is_no_artifact_but_a_nested_one_may_be(desk):
    desk.file(".git/config").touch()
    desk.file("nested/.git/config").touch()

    assert desk.paths(".git/*", ".git/**", "**/.git/*") == ["nested/.git/config"]


def test_only_regular_files_and_never_through_a_link(desk, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    desk.file("link.txt").symlink_to(outside / "secret.txt")
    desk.file("dangling.txt").symlink_to("nowhere")
    desk.file("directory").symlink_to(outside)
    os.mkfifo(desk.file("pipe.txt"))
    desk.file("folder.txt").mkdir()
    desk.file("real.txt").write_text("real")
    os.link(desk.file("real.txt"), desk.file("twin.txt"))

    made = desk.collect("*.txt", "directory/*", "**/secret.txt")

    assert [item.path for item in made if isinstance(item, Artifact)] == ["real.txt", "twin.txt"]
    assert [item for item in made if isinstance(item, SkippedFile)] == [
        SkippedFile("dangling.txt", "it is not a regular file"),
        SkippedFile("link.txt", "it is not a regular file"),
        SkippedFile("pipe.txt", "it is not a regular file"),
    ]
    assert all(b"secret" not in path.read_bytes() for path in desk.target.iterdir())


def test_odd_names_become_text_that_anybody_can_show(desk):
    for name in ("line\nbreak", "\udcff", "right\u202eto-left", "ünï"):
        desk.file(name).touch()

    assert desk.paths("*") == ["line%0Abreak", "right%E2%80%AEto-left", "ünï", "%FF"]


def test_what_goes_over_the_bound_is_left_out_and_smaller_ones_still_come(desk, monkeypatch):
    monkeypatch.setattr(workspace_collect, "ARTIFACT_BYTES_MAX", 100)
    for name, size in {"a": 60, "b": 60, "c": 40, "d": 1}.items():
        desk.file(name).write_bytes(b"x" * size)
    os.truncate(desk.file("b"), 2**40)

    made = desk.collect("*")

    assert [item.path for item in made if isinstance(item, Artifact)] == ["a", "c"]
    assert [item.path for item in made if isinstance(item, SkippedFile)] == ["b", "d"]
    assert "1099511627776 bytes the files that match" in made[1].reason


def test_too_many_files_are_bounded_and_told(desk, monkeypatch):
    monkeypatch.setattr(workspace_collect, "ARTIFACTS_MAX", 3)
    for number in range(6):
        desk.file(f"f{number}").touch()

    made = desk.collect("*")

    assert [type(item) for item in made] == [Artifact, Artifact, Artifact, SkippedFile]
    assert made[-1] == SkippedFile("f3", "and 2 more: over 3 files")


def test_paths_that_are_long_together_are_bounded_as_they_are_printed(desk, monkeypatch):
    monkeypatch.setattr(workspace_collect, "ARTIFACT_PATHS_BYTES_MAX", 2000)
    for number in range(6):
        desk.file(f"{chr(0xDCFF) * 200}{number}").touch()  # 601 bytes once each byte is %FF
    for number in range(12):
        os.mkfifo(desk.file(f"{'p' * 200}{number:02}"))

    made = desk.collect("?*")

    assert [item.path[-4:] for item in made if isinstance(item, Artifact)] == ["%FF0", "%FF1", "%FF2"]
    skipped = [item for item in made if isinstance(item, SkippedFile)]
    assert sum(item.reason == "it is not a regular file" for item in skipped) == 10
    assert skipped[-1].reason == "and 2 more: over 2000 bytes of paths"


def test_many_files_with_ordinary_paths_are_all_collected(desk):
    for number in range(1000):
        desk.file(f"reports/unit/{number:0120}.xml").touch()

    assert all(isinstance(item, Artifact) for item in desk.collect("reports/**"))


def test_what_was_found_before_the_search_grew_too_large_is_kept(desk, monkeypatch):
    monkeypatch.setattr(files, "ENTRIES_MAX", 5)
    desk.file("report").touch()
    for number in range(10):
        desk.file(f"many/f{number}").touch()

    made = desk.collect("report", "many/*")

    assert [item.path for item in made] == ["report", "."]
    assert made[-1].reason == "there are more than 5 files, and only the first were looked at; narrow the patterns"


def test_names_that_are_long_together_end_the_search_like_many_files(desk, monkeypatch):
    monkeypatch.setattr(files, "PATHS_BYTES_MAX", 1024**2)
    desk.file("report").touch()
    for number in range(1000):
        desk.file(f"{'d' * 200}/{'e' * 200}/{'f' * 200}/{'g' * 200}/{'h' * 200}/{number:0200}").touch()

    assert [item.path for item in desk.collect("report")] == ["report"]
    many = desk.collect("report", "**/*")
    assert [item.path for item in many[-1:]] == ["."]
    assert "1 MiB of paths" in many[-1].reason


def test_many_names_take_little_memory(desk):
    for number in range(1000):
        desk.file(f"many/{number}").touch()
    tracemalloc.start()
    with RootedFiles(desk.workspace) as found:
        kept = found.entries(b"many")
        size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(kept) == 1000
    assert size / 1000 < 400


def test_directories_nested_without_end_are_left_out(desk):
    here = os.open(desk.workspace, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("deep", dir_fd=here)
        inner = os.open("deep", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    desk.file("deep/x.txt").touch()

    made = desk.collect("**/x.txt")

    subprocess.run(["rm", "-rf", str(desk.workspace)], check=True)
    assert made[0].path == "deep/x.txt"
    assert made[1].reason == "the directory is nested too deeply"
    assert len(made) == 2


def test_directories_where_nothing_can_match_are_not_searched(desk, searched):
    desk.file("out/report.txt").touch()
    desk.file("out/below/x.txt").touch()
    desk.file("node_modules/a/b.txt").touch()

    assert desk.paths("out/*.txt") == ["out/report.txt"]

    assert b"node_modules" not in searched
    assert b"out" in searched


def test_a_workspace_that_is_gone_is_told(desk):
    desk.workspace.rmdir()

    (told,) = desk.collect("*")

    assert isinstance(told, SkippedFile)
    assert "could not be read" in told.reason


def test_a_target_that_takes_nothing_fails(desk):
    desk.file("a").touch()
    desk.target.rmdir()

    with pytest.raises(AttemptError, match="a could not be stored") as raised:
        desk.collect("a")

    assert raised.value.code == "collect_failed"


def test_cancelling_stops_between_files(desk):
    for number in range(200):
        desk.file(f"f{number}").write_bytes(b"x" * 100)

    async def cancel_after_the_first():
        workspaces = GitWorkspaces({"PATH": os.environ["PATH"]})
        first = asyncio.Event()

        async def take():
            async for _item in workspaces.collect(desk.workspace, ["*"], desk.target, frozenset()):
                first.set()

        taking = asyncio.create_task(take())
        await first.wait()
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking

    asyncio.run(cancel_after_the_first())

    assert 1 <= len(desk.stored) < 200


def test_cancelling_leaves_no_half_file(desk):
    with desk.file("big").open("wb") as file:
        file.truncate(1024**3)
    part = desk.target / TEMPORARY_FILE_NAME

    async def cancel_while_it_is_copied():
        workspaces = GitWorkspaces({"PATH": os.environ["PATH"]})

        async def take():
            async for _item in workspaces.collect(desk.workspace, ["*"], desk.target, frozenset()):
                pass

        taking = asyncio.create_task(take())
        async with asyncio.timeout(20):
            while not part.exists() or not part.stat().st_size:
                await asyncio.sleep(0.001)
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking

    asyncio.run(cancel_while_it_is_copied())

    assert desk.stored == []
