"""The output of the MCP tools is bounded and contains no secrets."""

import asyncio
import json
import time

import pytest

from sandbox.cli.commands.mcp import tools


class FakeClient:
    """A client for one task that has a log and artifacts."""

    def __init__(self, lines=(), data=b"", *, lines_per_event=1, contains_secret=False):
        self._lines = lines
        self._lines_per_event = lines_per_event
        self._data = data
        self._entry = {"name": "a.md", "path": "docs/a.md", "contains_secret": contains_secret, "content_type": "x/y"}

    async def logs(self, task_id, *, stream, tail):
        for line in self._lines[-tail * self._lines_per_event :]:
            yield line

    async def artifacts(self, task_id):
        patch = {**self._entry, "name": f"{task_id}.patch", "path": f".sandbox/{task_id}.patch"}
        return {"artifacts": [self._entry, patch]}

    async def read(self, task_id, name, *, bytes_max):
        return self._data


class EmptyClient:
    """A client for one task that has no artifacts."""

    def __init__(self, state):
        self._state = state

    async def artifacts(self, task_id):
        return {"artifacts": []}

    async def status(self, task_id):
        return {"state": self._state}


@pytest.mark.parametrize(("state", "message"), [("running", "no patch yet"), ("failed", "ended without a patch")])
async def test_missing_patch_error_depends_on_the_state(state, message):
    with pytest.raises(tools.ToolFailedError, match=f"artifact_not_found: .*{message}"):
        await tools.read_diff(EmptyClient(state), "t", 0)


async def test_long_log_is_reduced_to_its_last_lines_and_each_line_is_truncated():
    lines = [f"{number} ".encode() + b"x" * 5000 + b"\n" for number in range(200)]
    output_lines = (await tools.read_logs(FakeClient(lines), "t", "stdout", 1000)).split("\n")
    assert sum(map(len, output_lines)) < tools.RESPONSE_CHARACTERS_MAX + 200
    assert output_lines[0].endswith("earlier lines omitted]")
    assert output_lines[-1].startswith("199 xxx")
    assert output_lines[-1].endswith("[…]")


async def test_terminal_log_is_truncated_while_it_is_received():
    """One terminal event can contain thousands of lines, so the server may return more lines than requested."""
    lines = [f"[{number}]\n".encode() for number in range(200_000)]
    begun_at = time.process_time()
    output_lines = (await tools.read_logs(FakeClient(lines, lines_per_event=200), "t", "stdout", 1000)).split("\n")
    assert time.process_time() - begun_at < 10
    assert output_lines == ["[199000 earlier lines omitted]", *(f"[{number}]" for number in range(199_000, 200_000))]


async def test_short_log_is_returned_in_full():
    assert (await tools.read_logs(FakeClient([b"one\n", b"tw\xff\n"]), "t", "stdout", 5)) == "one\ntw\ufffd"


def test_long_text_is_read_in_contiguous_parts():
    text = "".join(f"line {number}\n" for number in range(20_000))
    collected, offset = "", 0
    while True:
        part, separator, _ = asyncio.run(tools.read_diff(FakeClient(data=text.encode()), "t", offset)).partition("\n[")
        collected += part
        if not separator:
            break
        offset += tools.RESPONSE_CHARACTERS_MAX
    assert collected == text


def test_offset_past_the_end_reports_the_length():
    assert asyncio.run(tools.read_diff(FakeClient(data=b"text"), "t", 4)) == "[End of file: it has 4 characters.]"
    assert (
        asyncio.run(tools.read_artifacts(FakeClient(data=b"text"), "t", "a.md", 9))
        == "[End of file: it has 4 characters.]"
    )
    assert asyncio.run(tools.read_diff(FakeClient(), "t", 0)) == "The task changed nothing."


@pytest.mark.parametrize(
    "call_tool",
    [lambda client: tools.read_diff(client, "t", 0), lambda client: tools.read_artifacts(client, "t", "a.md", 0)],
)
def test_artifact_with_secret_is_not_returned(call_tool):
    with pytest.raises(tools.ToolFailedError, match="artifact_contains_secret"):
        asyncio.run(call_tool(FakeClient(data=b"s3cr3t", contains_secret=True)))
    assert asyncio.run(call_tool(FakeClient(data=b"fine"))) == "fine"


class AmbiguousNamesClient(FakeClient):
    """A client for a task in which one artifact's name is another artifact's path.

    Like the server, the client searches by name first, then by path.
    """

    async def artifacts(self, task_id):
        rows = [("patch", "a.md", False), ("a.md", f".sandbox/{task_id}.patch", False), ("b.md", "patch", True)]
        keys = ("name", "path", "contains_secret")
        return {"artifacts": [{"content_type": "x/y", **dict(zip(keys, row, strict=True))} for row in rows]}

    async def read(self, task_id, name, *, bytes_max):
        listed = (await self.artifacts(task_id))["artifacts"]
        matching = [entry for key in ("name", "path") for entry in listed if entry[key] == name]
        return matching[0]["name"].encode()


def test_secret_flag_and_content_belong_to_the_same_artifact():
    client = AmbiguousNamesClient()
    assert asyncio.run(tools.read_artifacts(client, "t", "a.md", 0)) == "a.md"
    assert asyncio.run(tools.read_artifacts(client, "t", "patch", 0)) == "patch"
    assert asyncio.run(tools.read_diff(client, "t", 0)) == "a.md"
    with pytest.raises(tools.ToolFailedError, match="artifact_contains_secret"):
        asyncio.run(tools.read_artifacts(client, "t", "b.md", 0))


def test_workspace_file_is_not_found_as_a_generated_artifact():
    class Client(AmbiguousNamesClient):
        async def artifacts(self, task_id):
            row = {"name": "metadata-2.json", "path": "metadata.json", "contains_secret": False, "content_type": "x/y"}
            return {"artifacts": [row]}

    with pytest.raises(tools.ToolFailedError, match="artifact_not_found"):
        asyncio.run(tools.read_artifacts(Client(), "t", "metadata.json", 0))
    assert asyncio.run(tools.read_artifacts(Client(), "t", "metadata-2.json", 0)) == "metadata-2.json"


def test_artifact_is_found_by_name_or_path():
    for name in ("a.md", "docs/a.md"):
        assert asyncio.run(tools.read_artifacts(FakeClient(data=b"text"), "t", name, 0)) == "text"
    with pytest.raises(tools.ToolFailedError, match="artifact_not_found"):
        asyncio.run(tools.read_artifacts(FakeClient(), "t", "b.md", 0))
    assert json.loads(asyncio.run(tools.read_artifacts(FakeClient(), "t", None, 0)))[0]["path"] == "docs/a.md"
