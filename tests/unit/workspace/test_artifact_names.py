"""Names of artifacts are unique, short and visible, whatever files are called."""

from hypothesis import given
from hypothesis import strategies as st

from sandbox.workspace.artifact_names import TEMPORARY_NAME, ArtifactNames
from sandbox.workspace.content_types import content_type
from sandbox.workspace.visible_path import show


def test_the_base_name_comes_first_then_the_whole_path_then_a_number():
    names = ArtifactNames(frozenset({"task.patch"}))

    given_names = [
        names.claim(path) for path in (b"a/x.txt", b"b/x.txt", b"b__x.txt", b"x.txt", b"task.patch", b".env")
    ]

    assert given_names == ["x.txt", "b__x.txt", "b__x-2.txt", "x-2.txt", "task-2.patch", ".env"]


def test_a_long_name_keeps_its_end():
    name = ArtifactNames(frozenset()).claim("ü".encode() * 120 + b".json")

    assert name.endswith("ü.json")
    assert len(name.encode()) <= 200


@given(st.lists(st.binary(min_size=1, max_size=300).filter(lambda path: path.strip(b"/") and b"\0" not in path)))
def test_every_name_is_one_of_its_own(paths):
    names = ArtifactNames(frozenset({"metadata.json"}))

    claimed = [names.claim(path.strip(b"/")) for path in paths]

    assert len({*claimed, "metadata.json", TEMPORARY_NAME}) == len(paths) + 2
    for name in claimed:
        assert name.isprintable()
        assert "/" not in name
        assert 0 < len(name.encode()) < 250


def test_a_visible_path_is_unchanged_and_anything_else_is_escaped():
    assert show("src/ünï code.py".encode()) == "src/ünï code.py"
    assert show(b"a\nb\x7f\xff\xe2\x80\xae") == "a%0Ab%7F%FF%E2%80%AE"


def test_content_types_go_by_suffix():
    assert content_type("fix.patch") == "text/x-diff"
    assert content_type("REPORT.MD") == "text/markdown"
    assert content_type("archive.tar.gz") == "application/gzip"
    assert content_type("Makefile") == content_type(".json") == "application/octet-stream"


def test_as_many_as_may_be_collected_are_told_apart_at_once():
    names = ArtifactNames(frozenset())
    claimed = [names.claim(b"%d/" % number + b"x" * 200) for number in range(10_000)]
    assert len(set(claimed)) == 10_000
    assert claimed[-1] == "x" * 200 + "-10000"
