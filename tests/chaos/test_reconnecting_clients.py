"""Six clients follow two running tasks across two server restarts, without missing or repeated events.

`script/chaos` restarts the server fifty times, with twenty clients.
"""

import os

import pytest

from chaos.reconnecting_clients import CliClient
from chaos.restarts import FEW_CLIENTS, run_restarts
from doubles.random_seed import seed

RESTARTS = 2


@pytest.mark.timeout(300)
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sandbox processes are found by their control groups")
def test_clients_receive_the_whole_journal_across_restarts(tmp_path):
    result = run_restarts(tmp_path, RESTARTS, seed(), tasks=2, client_types=FEW_CLIENTS)
    assert result.violations == []
    assert result.client_count == len(FEW_CLIENTS)
    assert len(result.connections) == len(FEW_CLIENTS) - FEW_CLIENTS.count(CliClient)
    assert min(result.connections) > 1, "a client never lost its connection"
