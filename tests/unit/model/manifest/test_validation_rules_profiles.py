"""A manifest must name a profile that the server offers and for which the server's runtime is strong enough."""

import json

import pytest

from doubles.manifests import parse_manifest
from sandbox.model.manifest.parser import InvalidManifestError

TIER_TOO_WEAK_MESSAGE = "requires a runtime of tier vm or stronger; this server's runtime has tier namespaces"


def parse(vm, **options):
    """Return the profile of a manifest with this `vm` section."""
    manifest = {
        "version": "1",
        "kind": "Task",
        "metadata": {"name": "A task"},
        "repository": {"url": "https://example.org/r.git", "branch": "main"},
        "claude": {"prompt": "Do it."},
        "vm": vm,
    }
    return parse_manifest(json.dumps(manifest).encode(), is_json=True, **options).vm.profile


def single_error(vm, profiles):
    """Return the only error of a manifest with this `vm` section."""
    with pytest.raises(InvalidManifestError) as caught:
        parse(vm, problem_by_profile=profiles)
    (error,) = caught.value.errors
    return error.field, error.rule, error.message


def test_offered_profile_is_accepted():
    assert parse({"profile": "my-tools"}, problem_by_profile={"agentic-dev": "", "my-tools": ""}) == "my-tools"
    assert parse({}, problem_by_profile={"agentic-dev": ""}) == "agentic-dev"


def test_error_for_an_unknown_profile_lists_the_offered_profiles():
    profiles = {"basic": "", "strict": TIER_TOO_WEAK_MESSAGE, "agentic-dev": ""}
    offered = "must be one of this server's profiles: agentic-dev, basic"
    assert single_error({"profile": "nothing"}, profiles) == ("vm.profile", "not_offered", offered)


@pytest.mark.parametrize("vm", [{"profile": "agentic-dev"}, {}])
def test_profile_that_needs_a_stronger_runtime_is_rejected(vm):
    assert single_error(vm, {"agentic-dev": TIER_TOO_WEAK_MESSAGE}) == (
        "vm.profile",
        "not_offered",
        TIER_TOO_WEAK_MESSAGE,
    )


def test_any_profile_is_accepted_without_a_list_of_profiles():
    assert parse({"profile": "my-tools"}, problem_by_profile=None) == "my-tools"
