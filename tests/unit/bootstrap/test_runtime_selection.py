"""Selection of a server's runtime."""

import pytest

from sandbox.bootstrap.runtime_selection import (
    UnknownRuntimeError,
    choose_runtime,
    describe_failure,
    make_runtime,
    select_runtime,
)
from sandbox.interfaces.runtime import RuntimeProbe


def probe(name, strength, *, works=True, is_explicit_only=False):
    return RuntimeProbe(name, works, name, strength, remedy=f"Fix {name}.", is_explicit_only=is_explicit_only)


WEAK, MIDDLE, STRONG = probe("weak", 1), probe("middle", 2), probe("strong", 3)


@pytest.mark.parametrize(
    ("probes", "chosen"),
    [
        ([WEAK, STRONG, MIDDLE], "strong"),
        ([WEAK, MIDDLE, probe("strong", 3, works=False)], "middle"),
        ([WEAK, MIDDLE, probe("strong", 3, is_explicit_only=True)], "middle"),
        ([probe("strong", 3, is_explicit_only=True)], "strong"),
        ([probe("weak", 1, works=False), probe("strong", 3, works=False)], "weak"),
        ([probe("weak", 1, is_explicit_only=True), probe("strong", 3, works=False)], "strong"),
    ],
)
def test_strongest_working_runtime_is_selected(probes, chosen):
    choice = select_runtime(probes)
    assert choice.chosen.runtime == chosen
    assert [entry.strength for entry in choice.probes] == sorted((entry.strength for entry in probes), reverse=True)


def test_working_runtime_has_no_failure_message():
    assert describe_failure(select_runtime([WEAK, probe("strong", 3, works=False)])) is None


def test_failure_message_lists_all_remedies():
    message = describe_failure(select_runtime([probe("weak", 1, works=False), probe("strong", 3, works=False)]))
    assert message == "No runtime works, so no task can run. weak: Fix weak. strong: Fix strong."


def test_failure_message_names_the_requested_runtime():
    message = describe_failure(select_runtime([probe("strong", 3, works=False)]))
    assert message == "The runtime strong does not work here. Fix strong."


async def test_unknown_runtime_error_lists_the_runtimes(tmp_path):
    with pytest.raises(UnknownRuntimeError, match=r"no runtime 'docker'; choose one of auto, bubblewrap, gvisor"):
        await choose_runtime("docker", tmp_path)


@pytest.mark.parametrize("name", ["bubblewrap", "gvisor"])
def test_runtime_factory_returns_the_named_runtime(name, tmp_path):
    assert make_runtime(name, tmp_path).name == name


def test_automatically_selected_qemu_requires_kvm(tmp_path):
    assert make_runtime("qemu", tmp_path, excludes_emulation=True)._excludes_emulation
    assert not make_runtime("qemu", tmp_path)._excludes_emulation
    assert make_runtime("bubblewrap", tmp_path, excludes_emulation=True).name == "bubblewrap"
