"""Why a server is not ready, as it says itself."""

import os

import pytest

from sandbox.contracts.runtime import Probe
from sandbox.contracts.store import StoreError
from sandbox.control.health import HealthReport
from sandbox.stores.memory import MemoryStore
from sandbox.wiring.clock import SystemClock


@pytest.fixture
def report(tmp_path):
    return HealthReport(MemoryStore(), SystemClock(), tmp_path, [Probe("bubblewrap", True, "namespaces", 1)], ())


def with_disk(monkeypatch, **fields):
    """The real disk but for these fields."""
    names = ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail", "f_flag")
    real = os.statvfs("/")
    values = [fields.get(name, getattr(real, name)) for name in (*names, "f_namemax")]
    monkeypatch.setattr("sandbox.control.health.os.statvfs", lambda _: os.statvfs_result(values))


def test_a_server_with_everything_is_ready(report, monkeypatch):
    with_disk(monkeypatch, f_frsize=4096, f_bavail=10**9, f_flag=0)
    health = report.make()
    assert (health.ready, health.reasons) == (True, [])


@pytest.mark.parametrize(
    ("disk", "reason"),
    [
        ({"f_flag": os.ST_RDONLY, "f_bavail": 10**9}, "is read-only"),
        ({"f_flag": 0, "f_bavail": 1}, "is full"),
    ],
)
def test_a_disk_that_takes_nothing_is_told(report, monkeypatch, disk, reason):
    with_disk(monkeypatch, f_frsize=4096, **disk)
    health = report.make()
    assert not health.ready
    assert [reason in told for told in health.reasons] == [True]


def test_a_server_that_cannot_read_its_index_is_not_ready(report, monkeypatch):
    with_disk(monkeypatch, f_frsize=4096, f_bavail=10**9, f_flag=0)

    def broken(_):
        raise StoreError("gone")

    monkeypatch.setattr(MemoryStore, "count_by_state", broken)
    health = report.make()
    assert (health.ready, health.store_ok, len(health.reasons)) == (False, False, 1)
