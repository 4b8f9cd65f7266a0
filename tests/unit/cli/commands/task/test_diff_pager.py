"""Which pager a diff is shown in: git's own rules, asked of the real git."""

import pytest

from sandbox.cli.commands.task.diff import find_pager


@pytest.fixture
def configure(tmp_path, monkeypatch):
    """A user with this git configuration and these variables."""
    for variable in ("GIT_PAGER", "PAGER", "GIT_CONFIG_GLOBAL", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.chdir(tmp_path)

    def put(configuration: str, variables: dict[str, str]) -> None:
        (tmp_path / ".gitconfig").write_text(configuration)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


CORE = "[core]\n\tpager = of-core\n"


@pytest.mark.parametrize(
    ("configuration", "variables", "pager"),
    [
        ("", {"PAGER": "of-everything"}, "of-everything"),
        (CORE, {"PAGER": "of-everything"}, "of-core"),
        (CORE + "[pager]\n\tdiff = of-diff\n", {}, "of-diff"),
        (CORE + "[pager]\n\tdiff = of-diff\n", {"GIT_PAGER": "of-git"}, "of-git"),
        (CORE + "[pager]\n\tdiff = true\n", {}, "of-core"),
        (CORE + "[pager]\n\tdiff = false\n", {"GIT_PAGER": "of-git"}, None),
        (CORE, {"GIT_PAGER": "cat"}, None),
        (CORE, {"GIT_PAGER": ""}, None),
        (CORE, {"PATH": "/nonexistent"}, None),
    ],
)
def test_the_pager_is_the_one_that_git_diff_would_use(configure, configuration, variables, pager):
    configure(configuration, variables)
    assert find_pager() == pager
