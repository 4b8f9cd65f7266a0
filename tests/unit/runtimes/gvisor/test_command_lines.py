"""The command lines of runsc."""

from sandbox.runtimes.gvisor.command_lines import exec_arguments, kill_arguments


def test_signal_is_sent_to_the_command_only():
    arguments = kill_arguments("/usr/bin/runsc", "attemptattem", 15)
    assert arguments[-3:] == ["kill", "attemptattem", "15"]
    assert "-all" not in arguments
    assert exec_arguments("/usr/bin/runsc", "attemptattem", 100, 101, 102)[-4:] == [
        "exec", "--process=/proc/self/fd/100", "--internal-pid-file=/proc/self/fd/102", "attemptattem",
    ]  # fmt: skip
