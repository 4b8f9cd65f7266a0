"""`sandbox profile` lists, shows, imports and removes profiles without a server."""

import json
import os

import pytest

from doubles.image_archives import docker_archive, entry, layer, minimal_root, oci_archive


@pytest.fixture
def profile(run_cli, tmp_path):
    """Run `sandbox profile …` on a data directory."""

    def run(*arguments, **options):
        result = run_cli("profile", *arguments, "--data-dir", str(tmp_path / "data"), **options)
        return result.returncode, result.stdout.decode(), result.stderr.decode()

    return run


@pytest.fixture(scope="module")
def root_layer():
    """A layer with a small root file system whose programs are never started."""
    return minimal_root(is_truncated=True)


def test_builtin_profiles_are_listed_before_any_build(profile, tmp_path):
    code, output, _ = profile("list")
    assert code == 0
    assert [line.split()[:2] for line in output.splitlines()[1:]] == [["agentic-dev", "host"], ["basic", "host"]]
    assert not (tmp_path / "data").exists()
    _, record, _ = profile("show", "basic")
    assert "none; sandboxes use the host's /usr. Build an image: sandbox profile build basic" in record


def test_image_is_imported_shown_and_removed(profile, root_layer, tmp_path):
    archive = str(docker_archive(tmp_path / "tools.tar", root_layer))
    code, name, errors = profile("build", "my-tools", "--from-oci", archive, "--minimum-tier", "gvisor")
    assert (code, name.strip()[:16]) == (0, "my-tools@sha256:"), errors
    entries = {each["name"]: each for each in json.loads(profile("list", "-f", "json")[1])["profiles"]}
    assert entries["my-tools"]["image"]["name"] == name.strip()
    assert (entries["my-tools"]["minimum_tier"], entries["basic"]["image"]) == ("gvisor", None)
    record = json.loads(profile("show", "my-tools", "-f", "json")[1])
    assert record["image"]["source"].startswith("OCI image sha256:")
    assert name.strip() in profile("show", "my-tools")[1]
    assert profile("remove", "my-tools")[0] == 0
    assert [each["name"] for each in json.loads(profile("list", "-f", "json")[1])["profiles"]] == [
        "agentic-dev",
        "basic",
    ]


def test_docker_and_oci_archives_of_one_tree_have_equal_digests(profile, root_layer, tmp_path):
    archives = [docker_archive(tmp_path / "a.tar", root_layer), oci_archive(tmp_path / "b.tar", root_layer)]
    images = [json.loads(profile("build", "basic", "--from-oci", str(path), "-f", "json")[1]) for path in archives]
    assert images[0]["digest"] == images[1]["digest"]


def test_hostile_archive_is_rejected_without_leftovers(profile, tmp_path):
    archive = oci_archive(tmp_path / "evil.tar", layer(entry("../../evil", b"x")))
    code, output, errors = profile("build", "my-tools", "--from-oci", str(archive))
    assert (code, output) == (10, "")
    assert "leads out" in errors
    assert not list(tmp_path.rglob("evil"))
    assert profile("show", "my-tools")[0] == 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("show", "nothing"), 3, "available profiles: agentic-dev, basic"),
        (("remove", "basic"), 3, "no image"),
        (("build", "my-tools"), 2, "--from-oci"),
        (("build", "../evil", "--from-oci", os.devnull), 2, "Error"),
        (("build", "basic", "--minimum-tier", "vm"), 2, "--from-oci"),
        (("build", "basic", "--from-oci", "/nowhere/file"), 2, "/nowhere/file"),
    ],
)
def test_invalid_commands_report_errors(profile, arguments, code, message):
    exit_code, output, errors = profile(*arguments)
    assert (exit_code, output) == (code, "")
    assert message in errors


def test_offline_validation_accepts_an_unknown_profile(run_cli, tmp_path):
    text = (
        "version: '1'\nkind: Task\nmetadata: {name: A task}\n"
        "repository: {url: https://example.org/r.git, branch: main}\n"
        "claude: {prompt: Do it.}\nvm: {profile: %s}\n"
    )
    for name, note in (
        ("my-tools", ("Only the server can check whether the profile my-tools exists.")),
        ("basic", ""),
    ):
        (tmp_path / "task.yaml").write_text(text % name)
        result = run_cli("task", "validate", "task.yaml")
        assert result.returncode == 0, result.stderr
        assert note in result.stderr.decode()
