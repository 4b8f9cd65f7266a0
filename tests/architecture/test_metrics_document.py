"""`docs/metrics.md` lists exactly the metrics that the server exports."""

import re
from datetime import UTC, datetime
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from sandbox.api.observability import ServerMetrics
from sandbox.interfaces.placement import HostState, HostStatus
from sandbox.interfaces.server_services import Health, HostWithTasks


def exported_metrics() -> set[tuple[str, str, tuple[str, ...], str]]:
    metrics = ServerMetrics("0.1.0")
    metrics.record_response("/metrics", "GET", 200, 0.01)
    health = Health("0.1.0", 1.0, {}, [], True, 1, 2, is_ready=True)
    host = HostWithTasks(HostStatus("node-1", HostState.READY, last_contact_at=datetime.now(UTC)), [])
    text = metrics.render(health, [host], is_ready=True).decode()
    return {
        (
            family.name + ("_total" if family.type == "counter" else ""),
            family.type,
            tuple(sorted(set(family.samples[0].labels) - {"le"})),
            family.documentation,
        )
        for family in text_string_to_metric_families(text)
    }


def test_each_metric_is_listed_with_type_and_labels(root: Path):
    document = (root / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([^|]+) \| ([^|]+) \|$", document, re.MULTILINE)
    listed = {
        (name, metric_type, tuple(re.findall(r"`(\w+)`", labels)), help_) for name, metric_type, labels, help_ in rows
    }
    assert len(listed) == len(rows) > 10
    assert listed == exported_metrics()
