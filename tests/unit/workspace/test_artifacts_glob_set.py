"""Matching of artifact patterns."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.workspace.artifacts import GlobSet


def matches(pattern, path):
    globs = GlobSet([pattern])
    state = globs.start
    for name in path.split("/"):
        state = globs.advance(state, name)
    return globs.is_match(state)


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("*.patch", "fix.patch"),
        ("security-report.md", "security-report.md"),
        ("out/*.txt", "out/a.txt"),
        ("./out//a.txt", "out/a.txt"),
        ("**/*.xml", "a.xml"),
        ("**/*.xml", "a/b/c.xml"),
        ("**", "a/b/c"),
        ("out/**", "out/a/b"),
        ("out/", "out/a/b"),
        ("out/**/end", "out/end"),
        ("out/**/**/end", "out/a/end"),
        ("a?c", "abc"),
        ("[a-c][!x]", "by"),
        (".env*", ".env.local"),
        (".github/**", ".github/workflows/ci.yml"),
        ("**/.cache/*", "a/.cache/x"),
        ("a[*]b", "a*b"),
        ("ünï*", "ünïcode"),
    ],
)
def test_pattern_matches_path(pattern, path):
    assert matches(pattern, path)


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("*.patch", "sub/fix.patch"),
        ("*.patch", ".patch"),
        ("*.patch", "fix.patch.orig"),
        ("*", ".env"),
        ("?env", ".env"),
        ("[.]env", ".env"),
        ("**", ".git/config"),
        ("**/*.xml", ".venv/a.xml"),
        ("out/*", "out/a/b"),
        ("out/**", "out"),
        ("out/", "out"),
        ("out/**/end", "out/end/more"),
        ("Report.md", "report.md"),
        ("a.c", "abc"),
        ("x" * 1000, "x"),
    ],
)
def test_pattern_does_not_match_path(pattern, path):
    assert not matches(pattern, path)


def test_glob_set_matches_any_pattern():
    globs = GlobSet(["a", "b/c"])

    assert globs.is_match(globs.advance(globs.start, "a"))
    assert globs.advance(globs.start, "b")
    assert not globs.advance(globs.start, "c")


def test_empty_glob_set_matches_nothing():
    assert not GlobSet([]).start


@pytest.mark.parametrize("pattern", ["*a" * 120 + "b", "/".join(["**"] * 120) + "/b", "**/" + "*a/**/" * 60 + "b"])
def test_matching_a_hostile_pattern_is_fast(pattern):
    started = time.process_time()

    assert not matches(pattern, "/".join(["a" * 250] * 16))

    assert time.process_time() - started < 5


def reference(parts, names):
    """Match the names with a slow reference implementation of the rules."""
    if not parts:
        return not names
    if parts[0] == "**":
        return reference(parts[1:], names) or (bool(names) and names[0][0] != "." and reference(parts, names[1:]))
    hidden = bool(names) and names[0].startswith(".") and not parts[0].startswith(".")
    expression = parts[0].replace(".", r"\.").replace("*", ".*").replace("?", ".")
    return bool(names) and not hidden and bool(re.fullmatch(expression, names[0])) and reference(parts[1:], names[1:])


@given(
    st.lists(st.one_of(st.just("**"), st.text("ab.*?", min_size=1, max_size=4)), min_size=1, max_size=5),
    st.lists(
        st.text("ab.", min_size=1, max_size=4).filter(lambda name: name not in (".", "..")), min_size=1, max_size=5
    ),
)
def test_matching_gives_the_same_result_as_the_reference_implementation(parts, names):
    parts = [part for part in parts if part != "."] or ["a"]
    effective = [*parts, "*"] if parts[-1] == "**" else parts

    assert matches("/".join(parts), "/".join(names)) == reference(effective, names)
