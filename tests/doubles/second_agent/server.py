"""Runs a server that also supports the scripted agent. Argument: the settings as a JSON object, keyed by name."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from doubles.second_agent import all_agents
from sandbox.bootstrap.local_host import AgentsAndCommands
from sandbox.bootstrap.server import run
from sandbox.bootstrap.settings.load import load

FORK_SERVER = str(Path(__file__).with_name("runner_fork_server.py"))
FORK_SERVER_COMMAND = (sys.executable, "-I", FORK_SERVER, "sandbox.bootstrap.runner_fork_server")

if __name__ == "__main__":
    settings = load(json.loads(sys.argv[1]), os.environ).settings
    agents_and_commands = AgentsAndCommands(all_agents(), fork_server_command=FORK_SERVER_COMMAND)
    run(settings, announce="json", agents_and_commands=agents_and_commands)
