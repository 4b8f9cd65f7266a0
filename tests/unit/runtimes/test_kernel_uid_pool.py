"""When a sandbox ends, all processes with its uid are killed, so nothing else may use the uid."""

import pytest

from sandbox.runtimes.kernel_uid_pool import SANDBOX_UIDS


@pytest.mark.parametrize(
    ("others", "user"),
    [
        (range(65_536), "user accounts and the overflow uid"),
        (range(100_000, 600_100_001), "subordinate uids of users for containers (login.defs)"),
        (range(524_288, 1_879_048_192), "systemd containers"),
        (range(2_147_352_576, 2**32), "foreign uids of systemd, and uids that are negative as signed integers"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_sandbox_uids_do_not_overlap_conventional_uid_ranges(others, user):
    assert not set(SANDBOX_UIDS) & {others.start, others.stop - 1}
    assert SANDBOX_UIDS.stop <= others.start or others.stop <= SANDBOX_UIDS.start, user
