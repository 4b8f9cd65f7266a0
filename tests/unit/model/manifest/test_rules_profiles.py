"""A manifest names a profile that there is and that the server's runtime is strong enough for."""

import json

import pytest

from sandbox.model.manifest.parser import InvalidManifestError, parse_manifest

WEAK = "takes a runtime of the tier vm or a stronger one; this server's is of the tier namespaces"


def parse(vm, **parts):
    """The profile of a manifest with this `vm`."""
    manifest = {
        "version": "1",
        "kind": "Task",
        "metadata": {"name": "A task"},
        "repository": {"url": "https://example.org/r.git", "branch": "main"},
        "claude": {"prompt": "Do it."},
        "vm": vm,
    }
    return parse_manifest(json.dumps(manifest).encode(), is_json=True, **parts).vm.profile


def told(vm, profiles):
    """The only mistake of such a manifest."""
    with pytest.raises(InvalidManifestError) as caught:
        parse(vm, profiles=profiles)
    (mistake,) = caught.value.errors
    return mistake.field, mistake.rule, mistake.message


def test_a_profile_that_there_is_may_be_named():
    assert parse({"profile": "my-tools"}, profiles={"agentic-dev": "", "my-tools": ""}) == "my-tools"
    assert parse({}, profiles={"agentic-dev": ""}) == "agentic-dev"


def test_another_one_is_refused_and_those_on_offer_are_listed():
    profiles = {"basic": "", "strict": WEAK, "agentic-dev": ""}
    offered = "must be a profile that this server offers: agentic-dev, basic"
    assert told({"profile": "nothing"}, profiles) == ("vm.profile", "not_offered", offered)


@pytest.mark.parametrize("vm", [{"profile": "agentic-dev"}, {}])
def test_one_that_asks_for_a_stronger_runtime_is_refused_also_where_it_is_the_default(vm):
    assert told(vm, {"agentic-dev": WEAK}) == ("vm.profile", "not_offered", WEAK)


def test_without_a_server_any_name_is_taken_on_trust():
    assert parse({"profile": "my-tools"}, profiles=None) == "my-tools"
