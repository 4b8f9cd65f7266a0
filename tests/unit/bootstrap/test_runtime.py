"""Which runtime a server takes."""

import asyncio

import pytest

from sandbox.bootstrap.runtime import (
    UnknownRuntimeError,
    choose_runtime,
    describe_failure,
    make_runtime,
    select_strongest,
)
from sandbox.interfaces.runtime import RuntimeProbe


def probe(name, strength, *, works=True, is_explicit_only=False):
    return RuntimeProbe(name, works, name, strength, remedy=f"Mend {name}.", is_explicit_only=is_explicit_only)


WEAK, MIDDLE, STRONG = probe("weak", 1), probe("middle", 2), probe("strong", 3)


@pytest.mark.parametrize(
    ("probes", "chosen"),
    [
        ([WEAK, STRONG, MIDDLE], "strong"),
        ([WEAK, MIDDLE, probe("strong", 3, works=False)], "middle"),
        ([WEAK, MIDDLE, probe("strong", 3, is_explicit_only=True)], "middle"),
        ([probe("strong", 3, is_explicit_only=True)], "strong"),
        ([probe("weak", 1, works=False), probe("strong", 3, works=False)], "weak"),
    ],
)
def test_the_strongest_that_works_is_taken_and_a_slow_one_only_by_its_name(probes, chosen):
    choice = select_strongest(probes)
    assert choice.chosen.runtime == chosen
    assert [one.strength for one in choice.probes] == sorted((one.strength for one in probes), reverse=True)


def test_where_something_works_there_is_nothing_to_explain():
    assert describe_failure(select_strongest([WEAK, probe("strong", 3, works=False)])) is None


def test_where_nothing_works_every_mend_is_told():
    told = describe_failure(select_strongest([probe("weak", 1, works=False), probe("strong", 3, works=False)]))
    assert told == "No runtime works, so no task can run. weak: Mend weak. strong: Mend strong."


def test_a_runtime_asked_for_by_name_that_does_not_work_is_named():
    told = describe_failure(select_strongest([probe("strong", 3, works=False)]))
    assert told == "The runtime strong does not work here. Mend strong."


def test_an_unknown_name_is_told_with_those_that_there_are(tmp_path):
    with pytest.raises(UnknownRuntimeError, match=r"no runtime 'docker'; choose one of auto, bubblewrap, gvisor"):
        asyncio.run(choose_runtime("docker", tmp_path))


@pytest.mark.parametrize("name", ["bubblewrap", "gvisor"])
def test_each_name_is_a_runtime_of_that_name(name, tmp_path):
    assert make_runtime(name, tmp_path).name == name


def test_a_runner_does_not_emulate_what_its_server_chose_by_itself(tmp_path):
    assert make_runtime("qemu", tmp_path, auto=True)._only_kvm
    assert not make_runtime("qemu", tmp_path)._only_kvm
    assert make_runtime("bubblewrap", tmp_path, auto=True).name == "bubblewrap"
