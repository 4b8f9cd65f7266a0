"""Arguments, script and environment of sbatch, and the options that settings may contain."""

import shlex

import pytest

from sandbox.cluster_engines.slurm.commands import (
    SlurmSettings,
    find_option_error,
    job_script,
    sbatch_arguments,
    sbatch_environment,
)
from sandbox.interfaces.cluster_engine import JobRequest
from sandbox.model.resources import Resources

NAME = "sandbox-abcdefghij23"
MIB = 1024**2


def request(**fields):
    defaults = {
        "name": NAME,
        "command": ("/opt/worker", "a b", "$x"),
        "environment": {"TOKEN": "secret"},
        "resources": Resources(2, 300 * MIB + 1, 1),
        "time_limit_seconds": 3600,
        "grace_seconds": 30,
    }
    return JobRequest(**(defaults | fields))


def arguments(settings=SlurmSettings(), **fields):  # noqa: B008
    return sbatch_arguments(request(**fields), settings)


def test_arguments_describe_the_job():
    assert {
        f"--job-name={NAME}",
        "--cpus-per-task=2",
        "--mem=301M",
        "--signal=B:TERM@30",
        "--no-requeue",
        "--dependency=singleton",
        "--output=/dev/null",
    } <= set(arguments())
    assert not any("secret" in argument or argument.startswith("--partition") for argument in arguments())


@pytest.mark.parametrize(
    ("seconds", "grace", "minutes"), [(1, 1, 2), (60, 0, 2), (3600, 30, 62), (604_800, 30, 10_082)]
)
def test_time_limit_leaves_the_worker_its_full_run_time(seconds, grace, minutes):
    """Slurm may send SIGTERM a minute too early."""
    assert f"--time={minutes}" in arguments(time_limit_seconds=seconds, grace_seconds=grace)
    assert minutes * 60 - grace - 60 >= seconds


def test_requested_memory_is_never_zero():
    """`--mem=0` requests all the memory of a host."""
    found = arguments(resources=Resources(0, 0, 0))
    assert "--mem=1M" in found
    assert "--cpus-per-task=1" in found


def test_settings_become_arguments():
    settings = SlurmSettings(partition="long", account="ai", extra_options=("--exclusive",))
    assert arguments(settings)[-3:] == ["--partition=long", "--account=ai", "--exclusive"]


@pytest.mark.parametrize(("path", "argument"), [("/logs/100%j", "--output=/logs/100%%j"), ("/a b", "--output=/a b")])
def test_percent_sign_in_the_output_file_name_is_escaped(path, argument):
    assert argument in arguments(output_file=path)


@pytest.mark.parametrize("path", ["", "relative", "/a\nb", "/a\\b", "/a\0"])
def test_unusual_output_files_are_rejected(path):
    with pytest.raises(ValueError, match="output file"):
        arguments(output_file=path)


@pytest.mark.parametrize("argument", ["a b", "'", '"$x"', "\n#SBATCH --array=1-99", "`id`", "", "\\", "é"])
def test_script_executes_exactly_the_command(argument):
    script = job_script(request(command=("/opt/worker", argument)))
    shebang, _, command = script.partition("\n")
    assert shebang == "#!/bin/sh"
    assert shlex.split(command) == ["exec", "/opt/worker", argument]
    assert not command.startswith("#")


@pytest.mark.parametrize("command", [(), ("worker",), ("/opt/worker", "a\0b"), ("",)])
def test_unusable_commands_are_rejected(command):
    with pytest.raises(ValueError, match="absolute path"):
        job_script(request(command=command))


def test_environment_is_passed_on():
    environment = {"PATH": "/bin", "A_1": "x,y=z\n", "EMPTY": ""}
    assert sbatch_environment(request(environment=environment)) == environment


@pytest.mark.parametrize(
    "name", ["SBATCH_PARTITION", "SLURM_CONF", "SLURM_CLUSTERS", "LD_PRELOAD", "A B", "", "A=B", "1A", "é"]
)
def test_variables_that_change_sbatch_are_rejected(name):
    with pytest.raises(ValueError, match="environment"):
        sbatch_environment(request(environment={name: "x"}))


@pytest.mark.parametrize("option", ["--exclusive", "--constraint=a&b", "--nice=100", "--tmp=50G", "--exclude=n[1-3]"])
def test_listed_option_is_accepted(option):
    assert find_option_error(option) is None


@pytest.mark.parametrize(
    "option",
    [
        *("--wrap=id", "--array=1-9", "--export=ALL", "--requeue", "--job-name=x", "--output=/x", "--uid=0", "-p x"),
        *("qos=ai", "--qos=", "--qos=a b", "--qos=a\n--uid=0", "--account=x", "", "--dependency=1"),
    ],
)
def test_other_options_are_rejected(option):
    assert find_option_error(option).startswith("must be one of the options --constraint")


@pytest.mark.parametrize(
    ("options", "excluded", "expected"),
    [
        ((), (), []),
        ((), ("n1", "n2"), ["--exclude=n1,n2"]),
        (("--exclude=n[3-4]", "--nice=1"), (), ["--exclude=n[3-4]"]),
        (("--exclude=n[3-4]", "--nice=1"), ("n1",), ["--exclude=n[3-4],n1"]),
        (("--exclude=n3", "--exclude=n4"), ("n1",), ["--exclude=n4,n1"]),
    ],
)
def test_excluded_hosts_are_added_to_those_of_the_settings(options, excluded, expected):
    """sbatch uses only the last option of this name."""
    found = sbatch_arguments(request(), SlurmSettings(extra_options=options), excluded)
    assert [argument for argument in found if argument.startswith("--exclude")] == expected
    assert ("--nice=1" in found) == ("--nice=1" in options)
