"""A diff is shown in the pager that git itself would use. The tests run git."""

import pytest

from doubles.bare_repository import make_bare_repository
from doubles.deployment import git
from sandbox.cli.patches import find_pager


@pytest.fixture
def configure(tmp_path, monkeypatch):
    """Return a function that sets the user's git configuration and variables."""
    for variable in ("GIT_PAGER", "PAGER", "GIT_CONFIG_GLOBAL", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.chdir(tmp_path)

    def apply(configuration: str, variables: dict[str, str]) -> None:
        (tmp_path / ".gitconfig").write_text(configuration)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return apply


CORE_PAGER_SETTING = "[core]\n\tpager = of-core\n"


@pytest.mark.parametrize(
    ("configuration", "variables", "pager"),
    [
        ("", {"PAGER": "of-everything"}, "of-everything"),
        (CORE_PAGER_SETTING, {"PAGER": "of-everything"}, "of-core"),
        (CORE_PAGER_SETTING + "[pager]\n\tdiff = of-diff\n", {}, "of-diff"),
        (CORE_PAGER_SETTING + "[pager]\n\tdiff = of-diff\n", {"GIT_PAGER": "of-git"}, "of-git"),
        (CORE_PAGER_SETTING + "[pager]\n\tdiff = true\n", {}, "of-core"),
        (CORE_PAGER_SETTING + "[pager]\n\tdiff = false\n", {"GIT_PAGER": "of-git"}, None),
        (CORE_PAGER_SETTING, {"GIT_PAGER": "cat"}, None),
        (CORE_PAGER_SETTING, {"GIT_PAGER": ""}, None),
        (CORE_PAGER_SETTING, {"PATH": "/nonexistent"}, None),
    ],
)
def test_diff_uses_the_pager_of_git_diff(configure, configuration, variables, pager):
    configure(configuration, variables)
    assert find_pager() == pager


def test_pager_of_the_current_repository_is_not_used(configure, tmp_path, monkeypatch):
    """A repository that was unpacked from an archive may have any configuration."""
    configure("", {"PAGER": "of-everything"})
    git("init", "--quiet", ".", cwd=tmp_path)
    for key in ("core.pager", "pager.diff"):
        git("config", key, "of-repository", cwd=tmp_path)
    assert find_pager() == "of-everything"
    configure(CORE_PAGER_SETTING, {})
    assert find_pager() == "of-core"


def test_pager_of_a_bare_repository_in_the_working_tree_is_not_used(configure, tmp_path, monkeypatch):
    """A patch can add such a directory."""
    configure(CORE_PAGER_SETTING, {})
    bare = make_bare_repository(tmp_path / "docs", "[core]\n\tpager = of-patch\n")
    monkeypatch.chdir(bare)
    assert find_pager() == "of-core"
