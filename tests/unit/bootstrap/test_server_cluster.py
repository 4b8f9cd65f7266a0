"""A server without an engine in its settings loads no cluster code."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
from sandbox.bootstrap import server
from sandbox.bootstrap.server import choose_placements
from sandbox.bootstrap.settings.load import load
chosen = choose_placements(load({"config": "/dev/null"}, {"SANDBOX_CLUSTER_ENGINE": sys.argv[1]}).settings)
packages = (
    *("sandbox.placements.cluster", "sandbox.worker", "sandbox.cluster_engines"),
    "sandbox.bootstrap.cluster_placement",
)
loaded = [name for name in packages if name in sys.modules]
print(chosen.selected, sorted(chosen.by_name), len(loaded))
"""


@pytest.mark.parametrize(
    ("engine", "result"),
    [
        ("none", " [] 0"),
        ("processes", "cluster ['cluster'] 4"),
        ("slurm", "cluster ['cluster'] 4"),
        ("kubernetes", "cluster ['cluster'] 4"),
    ],
)
def test_cluster_is_loaded_only_with_an_engine(engine, result):
    completed = subprocess.run(
        [sys.executable, "-c", SCRIPT, engine], capture_output=True, text=True, timeout=60, check=True
    )
    assert completed.stdout == f"{result}\n"
