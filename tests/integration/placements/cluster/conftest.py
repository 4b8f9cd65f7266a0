"""A server for workers, and a submitted job."""

import pytest

from doubles.cluster_server import ClusterServer


@pytest.fixture
async def server(tmp_path):
    server = ClusterServer(tmp_path)
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def job(server):
    return await server.submit()
