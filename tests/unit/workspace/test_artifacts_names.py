"""Artifact names are unique, short and printable."""

import time
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.model.display_text import is_printable
from sandbox.workspace.artifacts import TEMPORARY_FILE_NAME, ArtifactNames, content_type
from sandbox.workspace.rooted_files import printable_path


def test_base_name_in_use_is_numbered_or_replaced_by_the_path():
    names = ArtifactNames(frozenset({"task.patch"}))

    allocated = [
        names.allocate(path) for path in (b"a/x.txt", b"b/x.txt", b"b__x.txt", b"x.txt", b"task.patch", b".env")
    ]

    assert allocated == ["x.txt", "b__x.txt", "b__x-2.txt", "x-2.txt", "task-2.patch", ".env"]


def test_long_name_keeps_its_suffix():
    name = ArtifactNames(frozenset()).allocate("ü".encode() * 120 + b".json")

    assert name.endswith("ü.json")
    assert len(name.encode()) <= 200


@given(st.lists(st.binary(min_size=1, max_size=300).filter(lambda path: path.strip(b"/") and b"\0" not in path)))
def test_names_are_unique_and_printable(paths):
    names = ArtifactNames(frozenset({"metadata.json"}))

    allocated = [names.allocate(path.strip(b"/")) for path in paths]

    assert len({*allocated, "metadata.json", TEMPORARY_FILE_NAME}) == len(paths) + 2
    for name in allocated:
        assert is_printable(name)
        assert "/" not in name
        assert 0 < len(name.encode()) < 250


def test_printable_path_escapes_unprintable_bytes():
    assert printable_path("src/ünï code.py".encode()) == "src/ünï code.py"
    assert printable_path(b"a\nb\x7f\xff\xe2\x80\xae") == "a%0Ab%7F%FF%E2%80%AE"


@pytest.mark.parametrize(
    ("path", "escaped"),
    [
        ("\u3164.txt", "%E3%85%A4.txt"),
        ("a\u2800b", "a%E2%A0%80b"),
        ("report\ufe0f.pdf", "report%EF%B8%8F.pdf"),
        ("x\u034f\U000e0041\u00a0y", "x%CD%8F%F3%A0%81%81%C2%A0y"),
        ("dir/\u0301name", "dir/%CC%81name"),
        ("\u061cfdp.exe", "%D8%9Cfdp.exe"),
    ],
)
def test_invisible_characters_are_escaped(path, escaped):
    assert printable_path(path.encode()) == escaped
    assert ArtifactNames(frozenset()).allocate(path.encode()) == escaped.rpartition("/")[2]


@pytest.mark.parametrize("name", ["报告.txt", "تقرير.pdf", "रिपोर्ट.md", "été.txt", "e\u0301.txt", "❤👍🏽🇩🇪.png"])
def test_names_in_any_script_are_unchanged(name):
    assert ArtifactNames(frozenset()).allocate(f"out/{name}".encode()) == name


def test_truncated_name_does_not_start_with_a_combining_mark():
    for number in range(90, 100):
        name = ArtifactNames(frozenset()).allocate(b"a" * 7 + "e\u0301".encode() * number)
        assert is_printable(name)
        assert len(name.encode()) <= 200


def test_content_type_follows_the_suffix():
    assert content_type("fix.patch") == "text/x-diff"
    assert content_type("REPORT.MD") == "text/markdown"
    assert content_type("archive.tar.gz") == "application/gzip"
    assert content_type("Makefile") == content_type(".json") == "application/octet-stream"


def test_many_equal_names_are_numbered_quickly():
    names = ArtifactNames(frozenset())
    allocated = [names.allocate(b"%d/" % number + b"x" * 200) for number in range(10_000)]
    assert len(set(allocated)) == 10_000
    assert allocated[-1] == "x" * 200 + "-10000"


def test_no_artifact_gets_a_name_that_git_reads():
    """Git would follow a file `.git`, or use a directory that contains `HEAD`, in the directory of a download."""
    names = ArtifactNames(frozenset())
    paths = (b".git", b"out/.Git", b"out/x.git", b".gitignore", b"commondir", b"out/CommonDir", b"out/HEAD")
    allocated = [names.allocate(path) for path in paths]
    assert allocated == [".git-2", "out__.Git", "x.git", ".gitignore", "commondir-2", "out__CommonDir", "out__HEAD"]


def test_names_are_unique_on_a_file_system_that_ignores_case():
    names = ArtifactNames(frozenset({"t1.patch"}))
    paths = ("T1.PATCH", "a/Straße", "b/STRASSE", "c/\xe9", "d/E\u0301", "e/report.md", "f/notes.md")
    allocated = [names.allocate(path.encode()) for path in paths]
    assert allocated == ["T1-2.PATCH", "Straße", "b__STRASSE", "\xe9", "d__E\u0301", "report.md", "notes.md"]


def test_thousands_of_names_that_differ_only_in_case_are_allocated_quickly():
    names = ArtifactNames(frozenset())
    cases = ["".join(letters) for letters in product(*(("a", "A"),) * 12)]
    started_at = time.process_time()
    allocated = [names.allocate(f"{case}/x".encode()) for case in cases]
    assert time.process_time() - started_at < 2
    assert len({name.casefold() for name in allocated}) == len(cases) == 4096
