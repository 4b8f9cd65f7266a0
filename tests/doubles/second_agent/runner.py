"""Entry point of a runner that also supports the scripted agent. Its first argument marks the process as a runner."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from doubles.second_agent import all_agents
from sandbox.bootstrap.runner import main

main(all_agents)
