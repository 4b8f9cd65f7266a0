"""Runs a server that also supports the scripted agent. Argument: the settings as a JSON object, keyed by name."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from doubles.second_agent import all_agents
from sandbox.bootstrap.local_host import AgentsAndRunnerCommand
from sandbox.bootstrap.server import run
from sandbox.bootstrap.settings.load import load

RUNNER_COMMAND = (sys.executable, "-I", str(Path(__file__).with_name("runner.py")), "sandbox.bootstrap.runner")

if __name__ == "__main__":
    settings = load(json.loads(sys.argv[1]), os.environ).settings
    run(settings, announce="json", agents_and_runner_command=AgentsAndRunnerCommand(all_agents(), RUNNER_COMMAND))
