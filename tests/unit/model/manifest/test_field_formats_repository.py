"""All URLs of a repository have the same location."""

import time

import pytest

from sandbox.model.manifest.field_formats import repository_location


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
