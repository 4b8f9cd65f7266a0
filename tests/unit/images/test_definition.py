"""The declarative file of a profile says what its image is built from, and nothing else."""

import pytest

from sandbox.bootstrap.runtime import image_components
from sandbox.images.definition import check_profile_name, read_definition, read_shipped, shipped_profiles
from sandbox.images.errors import InvalidProfileError
from sandbox.model.manifest.parser import BUILT_IN_PROFILES
from sandbox.model.tier import TIERS, is_strong_enough

GOOD = 'description = "tools"\ndate = 2026-11-01\n'


@pytest.fixture
def read(tmp_path):
    """Read such a file."""

    def read(text):
        path = tmp_path / "tools.toml"
        path.write_text(text)
        return read_definition(path)

    return read


def test_the_shipped_profiles_are_those_that_a_manifest_may_always_name():
    assert shipped_profiles() == tuple(sorted(BUILT_IN_PROFILES))


@pytest.mark.parametrize("name", BUILT_IN_PROFILES)
def test_a_shipped_profile_can_be_read_and_its_parts_are_known(name):
    declaration = read_shipped(name)
    assert {"ca-certificates", "curl", "git"} <= set(declaration.packages)
    assert set(declaration.parts) <= set(image_components())


def test_agentic_dev_has_what_agents_reach_for():
    declaration = read_shipped("agentic-dev")
    assert {"build-essential", "python3", "ripgrep"} <= set(declaration.packages)
    assert declaration.parts == ("node",)


def test_a_file_says_packages_files_and_the_minimum_tier(read):
    found = read(f'{GOOD}packages = ["git"]\nminimum_tier = "vm"\n[files]\n"/etc/motd" = "hello"\n')
    assert (found.packages, found.files, found.minimum_tier) == (("git",), {"/etc/motd": "hello"}, "vm")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no toml",
        'description = "tools"\ndate = "today"\n',
        f"{GOOD}mirror = 'x'\n",
        f'{GOOD}minimum_tier = "strong"\n',
        f'{GOOD}packages = ["--option"]\n',
        f'{GOOD}packages = ["git,evil"]\n',
        f'{GOOD}packages = ["/tmp/evil.deb"]\n',
        f'{GOOD}packages = "git"\n',
        f'{GOOD}[files]\n"relative" = "x"\n',
        GOOD + "#" * 70_000,
    ],
)
def test_a_file_that_makes_no_sense_is_refused(read, text):
    with pytest.raises(InvalidProfileError):
        read(text)


@pytest.mark.parametrize("name", ["my-tools", "a", "node20.1", "x" * 64])
def test_a_profile_may_have_this_name(name):
    assert check_profile_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "a..b", "a/b", "../x", "-x", "x-", "Upper", "host", "x" * 65, "a\n"])
def test_a_profile_cannot_have_this_name(name):
    with pytest.raises(InvalidProfileError):
        check_profile_name(name)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("minimum", TIERS)
def test_a_tier_is_strong_enough_for_itself_and_for_weaker_ones(tier, minimum):
    assert is_strong_enough(tier, minimum) == (TIERS.index(tier) >= TIERS.index(minimum))


def test_what_nobody_knows_is_never_strong_enough():
    assert not is_strong_enough("mystery", "namespaces")
    assert not is_strong_enough("vm", "mystery")
    assert is_strong_enough("mystery", "")
