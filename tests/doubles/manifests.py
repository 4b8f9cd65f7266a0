"""Manifests for tests."""

from functools import partial

import msgspec

from sandbox.agents.claude_code.agent import ClaudeCode
from sandbox.agents.claude_code.manifest_section import Claude
from sandbox.model.events import Record
from sandbox.model.manifest import parser
from sandbox.model.manifest.schema import (
    AgentSection,
    Lifecycle,
    Manifest,
    Metadata,
    Repository,
    Secret,
    Vm,
    decode_manifest,
    encode_manifest,
)
from sandbox.model.task import Task

AGENTS = {"claude": ClaudeCode()}
parse_manifest = partial(parser.parse_manifest, agents=AGENTS)
read_document = partial(parser.read_document, agents=AGENTS)
encode_json = msgspec.json.Encoder(enc_hook=encode_manifest).encode
decode_task = msgspec.json.Decoder(Task, dec_hook=decode_manifest).decode
decode_record = msgspec.json.Decoder(Record, dec_hook=decode_manifest).decode
to_builtins = partial(msgspec.to_builtins, enc_hook=encode_manifest)


def claude(prompt="Do it.", **settings):
    """Return a manifest's section for Claude Code."""
    return AgentSection("claude", msgspec.json.decode(msgspec.json.encode(Claude(prompt=prompt, **settings))))


def manifest(task_id="task-1", *, name="A task", **sections):
    """Return the minimal manifest, with additional parts such as `vm` and `lifecycle`, given as dictionaries."""
    return Manifest(
        metadata=Metadata(name=name, id=task_id, labels=sections.get("labels", {})),
        repository=Repository(
            **{"url": "https://example.org/r.git", "branch": "main", **sections.get("repository", {})}
        ),
        agent=claude(**sections.get("claude", {})),
        vm=Vm(**sections.get("vm", {})),
        secrets=tuple(Secret(name=name, source="env", key=name) for name in sections.get("manifest_secrets", ())),
        lifecycle=Lifecycle(**sections.get("lifecycle", {})),
    )


NAMES_BY_PROMPT = {
    "Fix the login": "Fix the login",
    "\n  ## Fix:\tthe\u200b login :\nBe quick.": "Fix: the login",
    "> * - Fix it": "Fix it",
    "#\nFix it": "",
    "word " * 40: "word " * 23 + "word…",
    "x" * 200: "x" * 119 + "…",
    "x" * 120: "x" * 120,
    "y" * 119 + " z": "y" * 119 + "…",
    " \n": "",
}
"""The names that the server and the dashboard's form generate from prompts."""
