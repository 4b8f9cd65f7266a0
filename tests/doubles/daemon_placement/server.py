"""Runs a server whose attempts run at the daemon. Arguments: the settings as JSON, and the daemon's socket."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from doubles.daemon_placement import NAME, create_placement_with
from sandbox.bootstrap.server import ChosenPlacements, run
from sandbox.bootstrap.settings.load import load

if __name__ == "__main__":
    placements = ChosenPlacements({NAME: create_placement_with(Path(sys.argv[2]))}, NAME)
    run(load(json.loads(sys.argv[1]), os.environ).settings, announce="json", placements=placements)
