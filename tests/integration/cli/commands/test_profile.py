"""`sandbox profile` lists, shows, imports and removes, without a server."""

import json
import os

import pytest

from doubles.image_archives import docker_archive, entry, layer, oci_archive, small_root


@pytest.fixture
def profile(sandbox, tmp_path):
    """Run `sandbox profile …` on a data directory."""

    def run(*arguments, **parts):
        ran = sandbox("profile", *arguments, "--data-dir", str(tmp_path / "data"), **parts)
        return ran.returncode, ran.stdout.decode(), ran.stderr.decode()

    return run


@pytest.fixture(scope="module")
def root_layer():
    """A small root."""
    return small_root(is_hollow=True)


def test_the_shipped_profiles_are_listed_before_anything_was_built(profile, tmp_path):
    code, listed, _ = profile("list")
    assert code == 0
    assert [line.split()[:2] for line in listed.splitlines()[1:]] == [["agentic-dev", "host"], ["basic", "host"]]
    assert not (tmp_path / "data").exists()
    _, shown, _ = profile("show", "basic")
    assert "host; build one with: sandbox profile build basic" in shown


def test_an_image_is_imported_shown_and_removed(profile, root_layer, tmp_path):
    archive = str(docker_archive(tmp_path / "tools.tar", root_layer))
    code, name, told = profile("build", "my-tools", "--from-oci", archive, "--minimum-tier", "gvisor")
    assert (code, name.strip()[:16]) == (0, "my-tools@sha256:"), told
    entries = {one["name"]: one for one in json.loads(profile("list", "-f", "json")[1])["profiles"]}
    assert entries["my-tools"]["image"]["name"] == name.strip()
    assert (entries["my-tools"]["minimum_tier"], entries["basic"]["image"]) == ("gvisor", None)
    shown = json.loads(profile("show", "my-tools", "-f", "json")[1])
    assert shown["image"]["source"].startswith("OCI image sha256:")
    assert name.strip() in profile("show", "my-tools")[1]
    assert profile("remove", "my-tools")[0] == 0
    assert [one["name"] for one in json.loads(profile("list", "-f", "json")[1])["profiles"]] == ["agentic-dev", "basic"]


def test_importing_the_same_again_gives_the_same_image(profile, root_layer, tmp_path):
    archives = [docker_archive(tmp_path / "a.tar", root_layer), oci_archive(tmp_path / "b.tar", root_layer)]
    told = [json.loads(profile("build", "basic", "--from-oci", str(one), "-f", "json")[1]) for one in archives]
    assert told[0]["digest"] == told[1]["digest"]


def test_a_hostile_archive_is_refused_and_leaves_nothing(profile, tmp_path):
    archive = oci_archive(tmp_path / "evil.tar", layer(entry("../../evil", b"x")))
    code, said, told = profile("build", "my-tools", "--from-oci", str(archive))
    assert (code, said) == (10, "")
    assert "leads out" in told
    assert not list(tmp_path.rglob("evil"))
    assert profile("show", "my-tools")[0] == 3


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("show", "nothing"), 3, "there are: agentic-dev, basic"),
        (("remove", "basic"), 3, "no image"),
        (("build", "my-tools"), 2, "--from-oci"),
        (("build", "../evil", "--from-oci", os.devnull), 2, "Error"),
        (("build", "basic", "--minimum-tier", "vm"), 2, "--from-oci"),
        (("build", "basic", "--from-oci", "/nowhere/file"), 2, "/nowhere/file"),
    ],
)
def test_what_cannot_be_done_is_said(profile, arguments, code, words):
    ended, said, told = profile(*arguments)
    assert (ended, said) == (code, "")
    assert words in told


def test_a_profile_that_only_the_server_knows_is_no_mistake_without_one(sandbox, tmp_path):
    text = (
        "version: '1'\nkind: Task\nmetadata: {name: A task}\n"
        "repository: {url: https://example.org/r.git, branch: main}\n"
        "claude: {prompt: Do it.}\nvm: {profile: %s}\n"
    )
    for name, note in (("my-tools", "Only the server can say whether it offers the profile my-tools."), ("basic", "")):
        (tmp_path / "task.yaml").write_text(text % name)
        checked = sandbox("task", "validate", "task.yaml")
        assert checked.returncode == 0, checked.stderr
        assert note in checked.stderr.decode()
