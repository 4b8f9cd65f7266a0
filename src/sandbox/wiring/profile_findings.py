"""What `sandbox doctor` says of the profiles."""

from sandbox.profiles.catalog import Catalog
from sandbox.wiring.finding import Finding
from sandbox.wiring.settings import ServerSettings


def find_profiles(settings: ServerSettings) -> list[Finding]:
    """What is in the sandboxes; a damaged image keeps the tasks of its profile from running, and no others."""
    catalog = Catalog(settings.server.data_dir.absolute())
    findings = []
    for entry in catalog.entries():
        if entry.problem:
            mend = f"sandbox profile build {entry.name}"
            findings.append(Finding("profiles", False, entry.problem, mend, is_needed=False))
        else:
            image = f"image {entry.record.digest}" if entry.record else "the host's own /usr; no image is built"
            findings.append(Finding("profiles", True, f"{entry.name}: {image}"))
    return findings
