"""The digest of a host's installed packages."""

import re

import pytest

from sandbox.images.image_builder import packages_digest

STATUS = """\
Package: bash
Status: install ok installed
Version: 5.2-1

Package: git
Status: install ok installed
Version: 1:2.47-1
"""


def packages_digest_of(directory, status):
    (directory / "var/lib/dpkg").mkdir(parents=True, exist_ok=True)
    (directory / "var/lib/dpkg/status").write_text(status)
    return packages_digest(directory)


def test_hosts_with_the_same_packages_and_versions_report_the_same(tmp_path):
    found = packages_digest_of(tmp_path, STATUS)
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", found)
    first, second = STATUS.split("\n\n")
    assert packages_digest_of(tmp_path, f"{second}\n{first}\n") == found
    assert packages_digest_of(tmp_path, STATUS.replace("5.2-1", "5.2-2")) != found


@pytest.mark.parametrize("status", ["", "no fields", "Package: bash\n"])
def test_packages_without_a_valid_database_are_unknown(tmp_path, status):
    assert packages_digest_of(tmp_path, status) == ""


def test_packages_of_a_host_without_dpkg_are_unknown(tmp_path):
    assert packages_digest(tmp_path) == ""
