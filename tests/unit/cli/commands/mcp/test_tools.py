"""What the tools for agents answer is bounded, and never a secret."""

import asyncio
import json

import pytest

from sandbox.cli.commands.mcp import tools


class Kept:
    """A client of one task: its log and its artifacts."""

    def __init__(self, lines=(), data=b"", *, contains_secret=False):
        self._lines = lines
        self._data = data
        self._entry = {"name": "a.md", "path": "docs/a.md", "contains_secret": contains_secret, "content_type": "x/y"}

    async def logs(self, task_id, *, stream, tail):
        for line in self._lines[-tail:]:
            yield line

    async def artifacts(self, task_id):
        patch = {**self._entry, "name": f"{task_id}.patch", "path": f".sandbox/{task_id}.patch"}
        return {"artifacts": [self._entry, patch]}

    async def read(self, task_id, name, *, bytes_max):
        return self._data


class Bare:
    """A client of one task that has kept nothing."""

    def __init__(self, state):
        self._state = state

    async def artifacts(self, task_id):
        return {"artifacts": []}

    async def status(self, task_id):
        return {"state": self._state}


@pytest.mark.parametrize(("state", "words"), [("running", "no patch yet"), ("failed", "ended without a patch")])
def test_who_asks_for_a_patch_that_is_not_there_hears_whether_it_will_be(state, words):
    with pytest.raises(tools.ToolFailedError, match=f"artifact_not_found: .*{words}"):
        asyncio.run(tools.diff(Bare(state), "t", 0))


def test_of_long_lines_the_last_ones_are_kept_and_cut():
    lines = [f"{number} ".encode() + b"x" * 5000 + b"\n" for number in range(200)]
    answer = asyncio.run(tools.logs(Kept(lines), "t", "stdout", 1000)).split("\n")
    assert sum(map(len, answer)) < tools.RESPONSE_CHARACTERS_MAX + 200
    assert answer[0].endswith("earlier lines omitted]")
    assert answer[-1].startswith("199 xxx")
    assert answer[-1].endswith("[…]")


def test_a_short_log_is_told_whole():
    assert asyncio.run(tools.logs(Kept([b"one\n", b"tw\xff\n"]), "t", "stdout", 5)) == "one\ntw\ufffd"


def test_a_long_text_is_read_part_by_part_without_a_hole():
    text = "".join(f"line {number}\n" for number in range(20_000))
    got, offset = "", 0
    while True:
        part, mark, _ = asyncio.run(tools.diff(Kept(data=text.encode()), "t", offset)).partition("\n[")
        got += part
        if not mark:
            break
        offset += tools.RESPONSE_CHARACTERS_MAX
    assert got == text


def test_who_asks_for_more_than_there_is_is_not_told_that_nothing_changed():
    assert asyncio.run(tools.diff(Kept(data=b"text"), "t", 4)) == "[End of file: it has 4 characters.]"
    assert asyncio.run(tools.artifacts(Kept(data=b"text"), "t", "a.md", 9)) == "[End of file: it has 4 characters.]"
    assert asyncio.run(tools.diff(Kept(), "t", 0)) == "It changed nothing."


@pytest.mark.parametrize(
    "ask", [lambda kept: tools.diff(kept, "t", 0), lambda kept: tools.artifacts(kept, "t", "a.md", 0)]
)
def test_what_contains_a_secret_is_not_sent_to_a_model(ask):
    with pytest.raises(tools.ToolFailedError, match="artifact_contains_secret"):
        asyncio.run(ask(Kept(data=b"s3cr3t", contains_secret=True)))
    assert asyncio.run(ask(Kept(data=b"fine"))) == "fine"


class NamedAlike(Kept):
    """Two artifacts: the name of one, which has a secret in it, is the path of the other. Read as the server does."""

    async def artifacts(self, task_id):
        rows = [("patch", "a.md", False), ("a.md", f".sandbox/{task_id}.patch", False), ("b.md", "patch", True)]
        keys = ("name", "path", "contains_secret")
        return {"artifacts": [{"content_type": "x/y", **dict(zip(keys, row, strict=True))} for row in rows]}

    async def read(self, task_id, name, *, bytes_max):
        listed = (await self.artifacts(task_id))["artifacts"]
        found = [entry for key in ("name", "path") for entry in listed if entry[key] == name]
        return found[0]["name"].encode()


def test_what_is_read_is_the_artifact_whose_flag_was_looked_at():
    client = NamedAlike()
    assert asyncio.run(tools.artifacts(client, "t", "a.md", 0)) == "a.md"
    assert asyncio.run(tools.artifacts(client, "t", "patch", 0)) == "patch"
    assert asyncio.run(tools.diff(client, "t", 0)) == "a.md"
    with pytest.raises(tools.ToolFailedError, match="artifact_contains_secret"):
        asyncio.run(tools.artifacts(client, "t", "b.md", 0))


def test_an_artifact_is_found_by_its_name_and_by_its_path():
    for name in ("a.md", "docs/a.md"):
        assert asyncio.run(tools.artifacts(Kept(data=b"text"), "t", name, 0)) == "text"
    with pytest.raises(tools.ToolFailedError, match="artifact_not_found"):
        asyncio.run(tools.artifacts(Kept(), "t", "b.md", 0))
    assert json.loads(asyncio.run(tools.artifacts(Kept(), "t", None, 0)))[0]["path"] == "docs/a.md"
