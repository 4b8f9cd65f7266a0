"""However many directories an agent made on its own disk, asking git about them takes none of the host's."""

import os
import stat
from io import RawIOBase

import pytest

from sandbox.workspace.diff.ignore_rules import IgnoreRules
from sandbox.workspace.files import Entry


class Judge(RawIOBase):
    """Plays git at both ends: ignores what ends with an odd number, and looks at what is there when it is asked."""

    def __init__(self, directory, answers_max=10**9):
        self.directory = directory
        self.answers = b""
        self.answers_max = answers_max
        self.seen_max = 0
        self.unseen = []

    def write(self, questions):
        paths = bytes(questions).split(b"\0")[:-1]
        self.seen_max = max(self.seen_max, sum(len(names) for _, names, _ in os.walk(self.directory)))
        self.unseen += [path for path in paths if not (self.directory / os.fsdecode(path)).is_dir()]
        for path in paths[: self.answers_max]:
            pattern = b"*[13579]" if path[-1] % 2 else b""
            self.answers += b"\0".join((b"", b"", pattern, path)) + b"\0"
        return len(questions)

    def read(self, _size=-1):
        answers, self.answers = self.answers, b""
        return answers


def directories(*paths):
    return [Entry(path, stat.S_IFDIR | 0o755) for path in paths]


MANY = directories(*(b"deep/down/here/%06d" % number for number in range(1500)))


def test_only_those_that_are_asked_about_are_there_and_none_afterwards(tmp_path):
    judge = Judge(tmp_path)
    with IgnoreRules(tmp_path, judge, judge) as rules:
        ignored = rules.ignored_paths(MANY)
    assert len(ignored) == len(MANY) // 2
    assert judge.unseen == []
    assert judge.seen_max < 500
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_when_git_ends_early(tmp_path):
    judge = Judge(tmp_path, answers_max=3)
    with pytest.raises(BrokenPipeError), IgnoreRules(tmp_path, judge, judge) as rules:
        rules.ignored_paths(MANY)
    assert list(tmp_path.iterdir()) == []


def test_what_was_laid_out_before_stays(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / ".gitignore").write_text("*.o\n")
    judge = Judge(tmp_path)
    with IgnoreRules(tmp_path, judge, judge) as rules:
        rules.ignored_paths([*MANY, *directories(b"deep/.gitignore/x")])
    assert (tmp_path / "deep" / ".gitignore").read_text() == "*.o\n"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == [".gitignore"]


def test_a_deep_tree_is_made_once_however_often_it_is_asked_about(tmp_path, monkeypatch):
    made = []
    make = os.mkdir
    monkeypatch.setattr(os, "mkdir", lambda path, *mode: (made.append(path), make(path, *mode)))
    judge = Judge(tmp_path)
    trunk = [b"/".join([b"d"] * depth) for depth in range(1, 250)]
    with IgnoreRules(tmp_path, judge, judge) as rules:
        for path in trunk:
            rules.ignored_paths(directories(path))
        for child in (b"a", b"b"):
            rules.ignored_paths(directories(trunk[-1] + b"/" + child))
            rules.ignored_paths(directories(trunk[-1] + b"/" + child + b"/leaf"))
        rules.ignored_paths(directories(trunk[9] + b"/other/leaf"))
    assert judge.unseen == []
    assert len(made) < 3 * len(trunk)
    assert list(tmp_path.iterdir()) == []
