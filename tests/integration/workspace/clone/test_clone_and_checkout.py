"""Cloning a repository into a workspace."""

import os
import shutil

import pytest

from doubles.workspace_harness import PUBLIC_URL, run_git
from sandbox.model.failure import AttemptError


def test_branch_is_checked_out_at_its_tip(harness):
    tip = harness.upstream.commit({"README.md": b"# Second\n"})

    assert harness.stage() == tip

    assert (harness.workspace / "README.md").read_bytes() == b"# Second\n"
    assert run_git("rev-parse", "HEAD", directory=harness.workspace) == tip
    assert run_git("symbolic-ref", "--short", "HEAD", directory=harness.workspace) == "main"
    assert run_git("status", "--porcelain", directory=harness.workspace) == ""
    run_git("fsck", "--strict", directory=harness.workspace)


def test_clone_without_a_commit_is_shallow(harness):
    harness.upstream.commit({"README.md": b"# Second\n"})

    harness.stage()

    assert run_git("rev-list", "--count", "HEAD", directory=harness.workspace) == "1"


def test_clone_with_a_commit_includes_the_history(harness):
    second = harness.upstream.commit({"README.md": b"# Second\n"})
    harness.upstream.commit({"README.md": b"# Third\n"})

    assert harness.stage(commit=second[:9].upper()) == second

    assert (harness.workspace / "README.md").read_bytes() == b"# Second\n"
    assert run_git("rev-list", "--count", "HEAD", directory=harness.workspace) == "2"
    assert run_git("status", "--porcelain", directory=harness.workspace) == ""


@pytest.mark.parametrize("branch", ["feature/deep/name", 'it"s#odd;'])
def test_branch_name_is_preserved(harness, branch):
    tip = harness.upstream.commit({"new": b"1\n"}, branch=branch)

    assert harness.stage(branch=branch) == tip

    assert run_git("symbolic-ref", "--short", "HEAD", directory=harness.workspace) == branch
    assert run_git("rev-parse", f"refs/remotes/origin/{branch}", directory=harness.workspace) == tip


def test_origin_url_is_the_only_configuration(harness):
    harness.configure("[http]\n\textraHeader = X-Token: very-secret-token\n[user]\n\tname = Operator")

    harness.stage()

    assert run_git("remote", "get-url", "origin", directory=harness.workspace) == PUBLIC_URL
    assert "secret" not in (harness.workspace / ".git" / "config").read_text()
    assert "secret" not in (harness.attempt_dir / "repository.git" / "config").read_text()
    assert not (harness.workspace / ".git" / "hooks").exists()


def test_agent_can_commit_branch_diff_and_log(harness):
    base = harness.stage()

    (harness.workspace / "README.md").write_text("# Mine\n")
    run_git("checkout", "--quiet", "-b", "mine", directory=harness.workspace)
    run_git("commit", "--quiet", "--all", "--message", "Mine", directory=harness.workspace)

    assert "# Mine" in run_git("diff", base, directory=harness.workspace)
    assert run_git("log", "--format=%s", directory=harness.workspace).splitlines() == ["Mine", "Work"]


def test_workspace_objects_are_not_hard_links_to_the_repository(harness):
    harness.stage()

    objects = [path for path in (harness.workspace / ".git").rglob("*") if path.is_file()]

    assert any(path.suffix == ".pack" for path in objects)
    assert {path.stat().st_nlink for path in objects} == {1}


def test_subpath_can_be_any_directory(harness):
    harness.stage(subpath="src")
    harness.stage(subpath="./src/")


@pytest.mark.parametrize("subpath", ["nowhere", "README.md", "link", "link/below", "src/app.py"])
def test_subpath_that_is_not_a_directory_fails(harness, subpath):
    (harness.upstream.work / "link").symlink_to("src")
    (harness.upstream.work / "src" / "below").mkdir()
    (harness.upstream.work / "src" / "below" / "file").write_text("")
    harness.upstream.commit_all()

    with pytest.raises(AttemptError, match=rf"'{subpath}' is not a directory in branch 'main'") as raised:
        harness.stage(subpath=subpath)

    assert raised.value.code == "clone_failed"


def test_staging_starts_over_after_a_crash(harness, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("kept")
    harness.workspace.mkdir(parents=True)
    (harness.workspace / "left").write_text("half a clone")
    (harness.workspace / "link").symlink_to(outside)
    (harness.attempt_dir / "repository.git").symlink_to(outside)

    harness.stage()

    assert not (harness.workspace / "left").exists()
    assert (harness.workspace / "README.md").exists()
    assert (outside / "precious").read_text() == "kept"


def test_sha256_repository_is_supported(make_harness):
    harness = make_harness("--object-format=sha256")
    base = harness.upstream.commit({"a": b"1\n"})

    assert harness.stage() == base

    assert len(base) == 64
    run_git("fsck", directory=harness.workspace)
    (harness.workspace / "a").write_text("2\n")
    assert harness.verify_patch(base)


def test_submodules_remain_empty_directories(harness):
    run_git(*("update-index", "--add", "--cacheinfo", f"160000,{'1' * 40},vendor/lib"), directory=harness.upstream.work)
    (harness.upstream.work / ".gitmodules").write_text(
        '[submodule "lib"]\n\tpath = vendor/lib\n\turl = https://git.example/demo.git\n'
    )
    run_git("add", ".gitmodules", directory=harness.upstream.work)
    run_git("commit", "--quiet", "--message", "Submodule", directory=harness.upstream.work)
    harness.upstream.push()

    base = harness.stage()

    assert list((harness.workspace / "vendor" / "lib").iterdir()) == []
    assert harness.patch(base) == b""


def test_lfs_pointers_remain_pointers(harness):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5\n"
    base = harness.upstream.commit({".gitattributes": b"*.bin filter=lfs diff=lfs merge=lfs -text\n", "x.bin": pointer})

    assert harness.stage() == base

    assert (harness.workspace / "x.bin").read_bytes() == pointer


def test_attributes_do_not_convert_files(harness):
    content = b"one\r\ntwo\n$Id$\n"
    work = harness.upstream.work
    attributes = b"* text eol=crlf ident working-tree-encoding=UTF-16\n"
    for name, stored in {"mixed.txt": content, ".gitattributes": attributes}.items():
        blob = run_git("hash-object", "-w", "--no-filters", "--stdin", directory=work, stdin=stored)
        run_git("update-index", "--add", "--cacheinfo", f"100644,{blob},{name}", directory=work)
    run_git("commit", "--quiet", "--message", "Mixed", directory=work)
    base = harness.upstream.push()

    harness.stage()

    assert (harness.workspace / "mixed.txt").read_bytes() == content
    assert run_git("status", "--porcelain", directory=harness.workspace) == ""
    assert harness.patch(base) == b""


def test_legacy_commit_format_errors_are_tolerated(harness):
    work = harness.upstream.work
    tree = run_git("rev-parse", "HEAD^{tree}", directory=work)
    commit = f"tree {tree}\nauthor A<a@example.org> 0 +051800\ncommitter A <a@example.org> 0 +0000\n\nOld\n"
    name = run_git(
        *("hash-object", "-t", "commit", "-w", "--stdin", "--literally"), directory=work, stdin=commit.encode()
    )
    run_git("reset", "--quiet", "--hard", name, directory=work)

    assert harness.stage() != name
    assert harness.upstream.push() == name
    assert harness.stage() == name


def test_credentials_come_from_the_configuration_of_the_server_user(harness):
    store = harness.root / "home" / "credentials"
    store.parent.mkdir()
    harness.server.credentials = "me:let-me-in"
    with pytest.raises(AttemptError, match="needs credentials"):
        harness.stage()

    host = harness.server.url.removeprefix("http://")
    store.write_text(f"http://me:let-me-in@{host}\n")
    harness.configure(f"[credential]\n\thelper = store --file={store}")
    harness.stage()

    assert (harness.workspace / "README.md").exists()


def test_credentials_from_an_extra_header_are_used(harness):
    harness.server.credentials = "me:let-me-in"
    harness.configure(f'[http "{harness.server.url}"]\n\textraHeader = Authorization: Basic bWU6bGV0LW1lLWlu')

    harness.stage()

    assert (harness.workspace / "README.md").exists()


def test_default_configuration_files_of_the_user_are_read(harness):
    home, config = harness.root / "home", harness.root / "xdg"
    (config / "git").mkdir(parents=True)
    home.mkdir()
    shutil.copy(harness.config, config / "git" / "config")
    home.joinpath(".gitconfig").write_text(
        f'[http "{harness.server.url}"]\n\textraHeader = Authorization: Basic bWU6bGV0LW1lLWlu\n'
    )
    harness.server.credentials = "me:let-me-in"
    harness.variables = {"PATH": os.environ["PATH"], "HOME": str(home), "XDG_CONFIG_HOME": str(config)}

    harness.stage()

    assert (harness.workspace / "README.md").exists()


@pytest.mark.parametrize("url", ["ssh://git@git.example/{path}", "git@git.example:{path}"])
def test_ssh_command_of_the_server_user_is_used(harness, url):
    ssh = harness.root / "ssh"
    # This program simulates ssh: it logs its arguments and runs the last argument, as the remote host would.
    ssh.write_text(f'#!/bin/sh\necho "$@" >> {harness.root}/calls\nfor command; do :; done\nexec sh -c "$command"\n')
    ssh.chmod(0o755)
    harness.configure(f"[core]\n\tsshCommand = {ssh} -4\n[ssh]\n\tvariant = ssh")

    harness.stage(url.format(path=str(harness.upstream.bare).lstrip("/") if "://" in url else harness.upstream.bare))

    assert (harness.workspace / "README.md").exists()
    assert "-4 " in (harness.root / "calls").read_text()
    assert "git@git.example git-upload-pack" in (harness.root / "calls").read_text()


LONG_BANNER = "#!/bin/sh\nhead -c 200000 /dev/zero | tr '\\0' 'x' | timeout 5 cat >&2 || exit 1\necho >&2\n"
"""Simulates an ssh that prints a long banner and aborts if the banner is not read."""


@pytest.mark.parametrize("is_confined", [True, False])
def test_long_ssh_banner_is_read(harness, is_confined):
    harness.confined = is_confined
    ssh = harness.root / "ssh"
    ssh.write_text(f'{LONG_BANNER}for command; do :; done\nexec sh -c "$command"\n')
    ssh.chmod(0o755)
    harness.configure(f"[core]\n\tsshCommand = {ssh}\n[ssh]\n\tvariant = ssh")

    harness.stage(f"git@git.example:{harness.upstream.bare}")

    assert (harness.workspace / "README.md").exists()


@pytest.mark.parametrize("banner", ["#!/bin/sh\n", LONG_BANNER])
def test_last_line_of_ssh_output_is_explained(harness, banner):
    ssh = harness.root / "ssh"
    ssh.write_text(f"{banner}echo 'Host key verification failed.' >&2\nexit 255\n")
    ssh.chmod(0o755)
    harness.configure(f"[core]\n\tsshCommand = {ssh}\n[ssh]\n\tvariant = ssh")

    with pytest.raises(AttemptError, match="known_hosts"):
        harness.stage(f"git@git.example:{harness.upstream.bare}")
