"""The plan that `sandbox setup` makes for a distribution, a user and the installed programs."""

import pytest

from sandbox.bootstrap.package_installation import PACKAGES, plan_setup
from sandbox.runtimes.nodejs import PACKAGE_FILES, npm_packages_source

DEBIAN = 'PRETTY_NAME="Debian GNU/Linux 13 (trixie)"\nID=debian\n'
UBUNTU = 'ID=ubuntu\nID_LIKE="debian"\n'
FEDORA = "ID=fedora\n"
ROCKY = 'ID="rocky"\nID_LIKE="rhel centos fedora"\n'
ALL = ("git", "bubblewrap", "curl", "e2fsprogs")
APT = ("apt-get", "install", "-y", "--no-install-recommends")


def plan(os_release, installed=(), *, is_root=True):
    return plan_setup(os_release, lambda name: name in installed, is_root=is_root)


@pytest.mark.parametrize(
    ("os_release", "commands"),
    [
        (DEBIAN, (("apt-get", "update"), (*APT, *ALL))),
        (UBUNTU, (("apt-get", "update"), (*APT, *ALL))),
        (FEDORA, (("dnf", "install", "-y", *ALL),)),
        (ROCKY, (("dnf", "install", "-y", *ALL),)),
        ("ID=arch\n", (("pacman", "-S", "--needed", "--noconfirm", *ALL),)),
        ('ID="opensuse-leap"\nID_LIKE="suse opensuse"\n', (("zypper", "--non-interactive", "install", *ALL),)),
        ("ID=plan9\n", ()),
        ("no fields", ()),
        ("", ()),
    ],
)
def test_commands_install_the_missing_packages_of_the_distribution(os_release, commands):
    assert plan(os_release).packages == ALL
    assert plan(os_release).commands == commands


def test_only_missing_packages_are_installed():
    assert plan(DEBIAN, {"git", "curl"}).commands[-1] == (*APT, "bubblewrap", "e2fsprogs")


def test_nothing_is_installed_if_nothing_is_missing():
    complete = plan(DEBIAN, {*PACKAGES, "runsc"})
    assert (complete.packages, complete.commands, complete.optional) == ((), (), ())


def test_gvisor_is_optional_and_installed_only_on_distributions_that_package_it():
    assert plan(DEBIAN).optional == ((*APT, "runsc"),)
    assert plan(DEBIAN, set(PACKAGES)).optional == (("apt-get", "update"), (*APT, "runsc"))
    assert plan(FEDORA).optional == ()


def test_ordinary_user_needs_sudo():
    ordinary = plan(DEBIAN, is_root=False)
    assert all(command[0] == "sudo" for command in (*ordinary.commands, *ordinary.optional))


def test_checkout_contains_the_definition_of_the_npm_packages():
    assert [name for name in PACKAGE_FILES if not (npm_packages_source() / name).is_file()] == []
