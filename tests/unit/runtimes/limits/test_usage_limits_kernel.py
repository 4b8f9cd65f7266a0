"""Which usage of kernel resources exceeds a limit."""

from sandbox.model.fixed_limits import SOCKET_BUFFER_BYTES_MAX
from sandbox.runtimes.limits.usage_limits import FileUsage, KernelUsage


def test_more_memory_is_not_proposed_if_it_does_not_raise_the_limit_on_socket_buffers():
    violation = KernelUsage(10, 257 << 20, SOCKET_BUFFER_BYTES_MAX).find_exceeded_limit()
    assert violation.endswith("the limit is 256 MiB. Read received data.")


def test_file_usage_within_the_limits_is_not_a_violation():
    for files in (FileUsage(), FileUsage(131_072, directories=8192, posix_locks=8192)):
        assert files.find_exceeded_limit() == ""
