"""The reader threads of many clients do not occupy all threads of the server."""

import asyncio
import os
import threading

import pytest

from sandbox.bootstrap import server
from sandbox.bootstrap.settings.load import load
from sandbox.primitives.fair_client_shares import CONCURRENT_THREADS_MAX

CLIENTS = 30


def test_threads_of_30_clients_run_at_the_same_time(tmp_path, monkeypatch):
    all_run = threading.Barrier(CLIENTS * CONCURRENT_THREADS_MAX + 1)

    def start_threads(*_):
        loop = asyncio.get_running_loop()
        for _ in range(CLIENTS * CONCURRENT_THREADS_MAX):
            loop.run_in_executor(None, all_run.wait, 30)
        all_run.wait(30)
        raise OSError("the address is in use")

    monkeypatch.setattr(server, "bind", start_threads)
    monkeypatch.setattr(server, "configure_logging", lambda *_: None)
    monkeypatch.setattr(server, "_raise_descriptor_limit", lambda: None)
    monkeypatch.setattr(os, "umask", lambda _: 0)
    settings = load({"config": "/dev/null"}, {"SANDBOX_SERVER_DATA_DIR": str(tmp_path)}).settings
    with pytest.raises(OSError, match="the address is in use"):
        server.run(settings)
