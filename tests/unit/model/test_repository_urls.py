"""Names of repositories: all URLs of a repository have the same location."""

import time

import pytest

from sandbox.model.repository_urls import repository_location, short_repository


@pytest.mark.parametrize(
    "url",
    [
        "git@github.com:Org/Repo.git",
        "git@github.com:/org/repo",
        "ssh://git@github.com:22/org/repo.git/",
        "https://github.com/org/repo.git",
        "GitHub.com/org/repo/",
    ],
)
def test_urls_of_a_repository_have_the_same_location(url):
    assert repository_location(url) == "github.com/org/repo"


@pytest.mark.parametrize("text", ["a", "a@", "/", "a/b@", ":a@"])
def test_location_of_any_text_is_computed_in_linear_time(text):
    began = time.process_time()
    repository_location(text * 200_000)
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://github.com/org/repo.git", "org/repo"),
        ("https://host/a/b/c/", "b/c"),
        ("http://127.0.0.1:9430/example.git", "127.0.0.1:9430/example"),
        ("ssh://git@host:22/example", "host:22/example"),
        ("git@github.com:org/repo.git", "org/repo"),
        ("git@host:example", "host/example"),
        ("org/repo", "org/repo"),
        ("", ""),
    ],
)
def test_short_repository_name_includes_the_host_if_the_path_has_one_part(url: str, name: str):
    assert short_repository(url) == name
