"""All processes of a sandbox's uid are killed at its end, so the uid must not be used elsewhere."""

import pytest

from sandbox.runtimes.limits.kernel_uid import SANDBOX_UIDS


@pytest.mark.parametrize(
    ("others", "user"),
    [
        (range(65_536), "accounts and the classic overflow uid"),
        (range(100_000, 600_100_001), "subordinate uids of users (login.defs), for their containers"),
        (range(524_288, 1_879_048_192), "containers of systemd"),
        (range(2_147_352_576, 2**32), "foreign and signed ids"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_sandbox_uids_do_not_overlap_other_ranges(others, user):
    assert not set(SANDBOX_UIDS) & {others.start, others.stop - 1}
    assert SANDBOX_UIDS.stop <= others.start or others.stop <= SANDBOX_UIDS.start, user
