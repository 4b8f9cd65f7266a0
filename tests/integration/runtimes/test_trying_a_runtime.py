"""What is told of a runtime that does not work, in words that make a sentence."""

import asyncio
from types import SimpleNamespace

import pytest

from sandbox.contracts.runtime import Exit
from sandbox.model.errors import SandboxError
from sandbox.runtimes.bubblewrap.probe import probe_by_trying
from sandbox.runtimes.trying import try_once, why_not_confined


class Failing:
    """A runtime whose programs end as `exit_` says, or never; it is its sandboxes and its control groups, too."""

    def __init__(self, exit_: Exit | None, said: bytes = b"") -> None:
        self.exit_, self.said = exit_, said

    def plan(self, attempt_id):
        return SimpleNamespace(attempt_id=attempt_id)

    async def create(self, handle, spec):
        return self

    async def destroy(self, handle, disk):
        pass

    async def start(self, command):
        async def read(size):
            return self.said

        return None, SimpleNamespace(read=read)

    async def wait(self):
        if self.exit_ is None:
            await asyncio.Event().wait()
        return self.exit_

    def confine(self, handle, spec):
        return self

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def run(self, command):
        return (await self.wait()).code

    def group(self, attempt_id):
        return SimpleNamespace(limits=frozenset)


@pytest.mark.parametrize(
    ("exit_", "said", "told"),
    [
        (Exit(1), b"no room\n", "'true' ended in a sandbox with exit code 1: no room."),
        (Exit(137), b"", "'true' ended in a sandbox with exit code 137."),
        (Exit(None), b"bwrap: gone.\n", "'true' did not end in a sandbox, which was gone before it: bwrap: gone."),
        (None, b"", "'true' did not end in a sandbox within 0.1 s."),
    ],
)
def test_how_the_first_program_ended_is_a_sentence(tmp_path, exit_, said, told):
    runtime = Failing(exit_, said)
    with pytest.raises((SandboxError, TimeoutError)) as caught:
        asyncio.run(try_once(runtime, tmp_path, runtime, memory_bytes=1, within_seconds=0.1))
    assert str(caught.value) == told


def test_what_keeps_bubblewrap_from_working_stands_in_whole_sentences(tmp_path):
    runtime = Failing(Exit(1))
    mend = asyncio.run(probe_by_trying(runtime, tmp_path, runtime)).mend
    assert mend.startswith(("'true' ended in a sandbox with exit code 1. User", "The kernel does not let users"))
    runtime.create = None  # something else than this house's own errors: no full stop
    runtime.plan = lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error"))
    assert "error. User namespaces" in asyncio.run(probe_by_trying(runtime, tmp_path, runtime)).mend


@pytest.mark.parametrize(
    ("exit_", "told"),
    [(Exit(0), None), (Exit(2), "git ended with exit code 2"), (None, "git did not end within 0.1 s")],
)
def test_why_git_is_not_confined_is_told_in_words(tmp_path, monkeypatch, exit_, told):
    monkeypatch.setattr("sandbox.runtimes.trying._SECONDS", 0.1)
    assert asyncio.run(why_not_confined(Failing(exit_), tmp_path)) == told
