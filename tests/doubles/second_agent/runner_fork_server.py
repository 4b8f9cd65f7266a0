"""Entry point of a fork server whose runners also support the scripted agent.

Its first argument marks the forked processes as runners.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from doubles.second_agent import all_agents
from sandbox.bootstrap.runner_fork_server import main

main(all_agents)
