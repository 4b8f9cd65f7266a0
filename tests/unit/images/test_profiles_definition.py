"""The definition file of a profile."""

import pytest

from sandbox.cli.commands.profile import image_components
from sandbox.images.profiles import check_profile_name, read_definition, read_shipped, shipped_profiles
from sandbox.interfaces.images import InvalidProfileError
from sandbox.interfaces.runtime import TIERS, is_strong_enough
from sandbox.model.manifest.parser import SHIPPED_PROFILES

VALID = 'description = "tools"\ndate = 2026-11-01\n'


@pytest.fixture
def read(tmp_path):
    """Return a function that reads a definition from this text."""

    def read(text):
        path = tmp_path / "tools.toml"
        path.write_text(text)
        return read_definition(path)

    return read


def test_shipped_profiles_match_the_built_in_names():
    assert shipped_profiles() == tuple(sorted(SHIPPED_PROFILES))


@pytest.mark.parametrize("name", SHIPPED_PROFILES)
def test_shipped_profile_is_valid_with_known_components(name):
    definition = read_shipped(name)
    assert {"ca-certificates", "curl", "git"} <= set(definition.packages)
    assert set(definition.components) <= set(image_components())


def test_agentic_dev_has_common_tools():
    definition = read_shipped("agentic-dev")
    assert {"build-essential", "python3", "ripgrep"} <= set(definition.packages)
    assert definition.components == ("node",)


def test_definition_has_packages_and_files_and_a_minimum_tier(read):
    definition = read(f'{VALID}packages = ["git"]\nminimum_tier = "vm"\n[files]\n"/etc/motd" = "hello"\n')
    assert (definition.packages, definition.files, definition.minimum_tier) == (("git",), {"/etc/motd": "hello"}, "vm")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no toml",
        'description = "tools"\ndate = "today"\n',
        f"{VALID}mirror = 'x'\n",
        f'{VALID}minimum_tier = "strong"\n',
        f'{VALID}packages = ["--option"]\n',
        f'{VALID}packages = ["git,evil"]\n',
        f'{VALID}packages = ["/tmp/evil.deb"]\n',
        f'{VALID}packages = "git"\n',
        f'{VALID}[files]\n"relative" = "x"\n',
        VALID + "#" * 70_000,
    ],
)
def test_invalid_definition_is_rejected(read, text):
    with pytest.raises(InvalidProfileError):
        read(text)


@pytest.mark.parametrize("name", ["my-tools", "a", "node20.1", "x" * 64])
def test_valid_profile_name_is_accepted(name):
    assert check_profile_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "a..b", "a/b", "../x", "-x", "x-", "Upper", "host", "x" * 65, "a\n"])
def test_invalid_profile_name_is_rejected(name):
    with pytest.raises(InvalidProfileError):
        check_profile_name(name)


@pytest.mark.parametrize("runtime_tier", TIERS)
@pytest.mark.parametrize("minimum_tier", TIERS)
def test_tier_satisfies_itself_and_weaker_tiers(runtime_tier, minimum_tier):
    assert is_strong_enough(runtime_tier, minimum_tier) == (TIERS.index(runtime_tier) >= TIERS.index(minimum_tier))


def test_unknown_tier_does_not_satisfy_any_requirement():
    assert not is_strong_enough("mystery", "namespaces")
    assert not is_strong_enough("vm", "mystery")
    assert is_strong_enough("mystery", "")
