"""The forbidden paths of a patch are exactly the paths that `git apply` refuses on any system."""

import os
import subprocess

import pytest

from doubles.workspace_harness import run_git
from sandbox.workspace.diff.comparison import is_forbidden_path

NAMES = (
    *(b".git", b".GIT", b"git~1", b".git. .", b".git::$INDEX_ALLOCATION", b".git\\x", b".git:x", b"deep/.Git/x"),
    *(b"b\\.git", b"x\\git~1", b"b\\.git\\c", b"a\\\\.git", b"\\.git", b"b\\.gitx", b"a:.git", b"git~2", b".github"),
    *(b".gitmodules", b".gitModules ", b".gitmodules:x", b".gitmodules\\x", b"x\\.gitmodules", b".gitmodules:/link"),
    *(b".gitmodules/link", b".gitmodules /link", b"gitmod~1", b"gitmod~4", b"gitmod~5", b"gitmod~1."),
    *(b"gi7eba~1", b"GI7EBA~9. .", b"gi7eba~1:x", b"gi7eba~1\\x", b"x\\gi7eba~1", b"gi7eb~12", b"gi7e~123"),
    *(b"gi7~1234", b"gi~12345", b"g~123456", b"~1234567", b"gi7eba~0", b"gi7eba~10", b"gi7ebb~1", b"~0234567"),
    *(b"~123456", b"gi7d29~1", b"gi250a~1", b"maba30~1", b".gitattributes", b".gitignore", b".mailmap", b"gitatt~1"),
    *("\u200c.git".encode(), ".g\u200cit".encode(), b".git\xff", b".gi\xfft", ".git\u202emodules".encode()),
    *("~123456\u0667".encode(), "g\u0131t~1".encode(), "\u200cgit".encode()),
)


@pytest.fixture
def clone(tmp_path):
    """A clone to which patches are applied."""
    run_git("init", "--quiet", ".", directory=tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_link", [False, True], ids=["file", "link"])
def test_path_is_forbidden_if_git_refuses_it_on_any_system(clone, name, is_link):
    results = [git_accepts_path(clone, name, is_link, protect_hfs) for protect_hfs in ("false", "true")]

    assert is_forbidden_path(name, is_link=is_link) is (not all(results))


def git_accepts_path(clone, name, is_link, protect_hfs):
    mode = b"120000" if is_link else b"100644"
    old_path, new_path = quoted(b"a/" + name), quoted(b"b/" + name)
    patch = (
        b"diff --git %b %b\nnew file mode %b\n--- /dev/null\n+++ %b\n@@ -0,0 +1 @@\n+x\n\\ No newline at end of file\n"
    )
    done = subprocess.run(
        ["git", "-c", f"core.protectHFS={protect_hfs}", "apply", "--cached", "-"],
        cwd=clone,
        env={"PATH": os.environ["PATH"], "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_INDEX_FILE": f"index-{protect_hfs}"},
        input=patch % (old_path, new_path, mode, new_path),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0 or b"invalid path" in done.stderr, done.stderr
    return done.returncode == 0


def quoted(path):
    return b'"' + path.replace(b"\\", b"\\\\") + b'"'
