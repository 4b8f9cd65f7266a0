"""The runner as a process, from its start until it has the journal."""

import os
import signal
import subprocess
import sys

from sandbox.journal.journals import FileJournals

IMPATIENT = """
import sandbox.model.limits
sandbox.model.limits.LAUNCH_SECONDS = 1
from sandbox.wiring.runner import main
main()
"""


def test_a_runner_that_never_gets_its_order_ends_and_frees_the_journal(tmp_path):
    journals = FileJournals(tmp_path)
    writer = journals.create("task-1")
    order_in, order_out = os.pipe()
    runner = subprocess.Popen(
        [sys.executable, "-c", IMPATIENT, f"--lock-fd={writer.lock_fd}"], stdin=order_in, pass_fds=(writer.lock_fd,)
    )
    try:
        writer.close()
        assert journals.is_held("task-1")
        assert runner.wait(20) == -signal.SIGALRM
        assert not journals.is_held("task-1")
    finally:
        runner.kill()
        runner.wait()
        os.close(order_in)
        os.close(order_out)
