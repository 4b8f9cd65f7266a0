import pytest

from sandbox.bootstrap.server import REGISTERED_PLACEMENTS, RegisteredPlacement, choose_placements
from sandbox.bootstrap.settings.load import ConfigurationError
from sandbox.bootstrap.settings.schema import ClusterSection, ServerSettings


async def create_other(context):
    raise AssertionError("must not be called")


def with_other(*, is_selected):
    return {**REGISTERED_PLACEMENTS, "other": RegisteredPlacement(lambda settings: is_selected, lambda: create_other)}


def test_a_registered_placement_is_chosen_by_the_settings():
    chosen = choose_placements(ServerSettings(), with_other(is_selected=True))
    assert (dict(chosen.by_name), chosen.selected) == ({"other": create_other}, "other")
    assert choose_placements(ServerSettings(), with_other(is_selected=False)) == ({}, "")


def test_a_placement_that_is_not_chosen_is_not_loaded():
    def fail():
        raise AssertionError("must not be loaded")

    registered = {"other": RegisteredPlacement(lambda settings: False, fail)}
    assert choose_placements(ServerSettings(), registered) == ({}, "")


def test_settings_that_select_several_placements_are_rejected():
    settings = ServerSettings(cluster=ClusterSection(engine="processes"))
    with pytest.raises(ConfigurationError, match="all are configured: cluster, other"):
        choose_placements(settings, with_other(is_selected=True))
