"""Cloning a repository into a workspace."""

import os
import shutil

import pytest

from doubles.workspace_fixture import PUBLIC_URL, run_git
from sandbox.model.failure import AttemptError


def test_branch_is_checked_out_at_its_tip(env):
    tip = env.upstream.commit({"README.md": b"# Second\n"})

    assert env.stage() == tip

    assert (env.workspace / "README.md").read_bytes() == b"# Second\n"
    assert run_git("rev-parse", "HEAD", directory=env.workspace) == tip
    assert run_git("symbolic-ref", "--short", "HEAD", directory=env.workspace) == "main"
    assert run_git("status", "--porcelain", directory=env.workspace) == ""
    run_git("fsck", "--strict", directory=env.workspace)


def test_clone_without_commit_is_shallow(env):
    env.upstream.commit({"README.md": b"# Second\n"})

    env.stage()

    assert run_git("rev-list", "--count", "HEAD", directory=env.workspace) == "1"


def test_clone_with_commit_includes_history(env):
    second = env.upstream.commit({"README.md": b"# Second\n"})
    env.upstream.commit({"README.md": b"# Third\n"})

    assert env.stage(commit=second[:9].upper()) == second

    assert (env.workspace / "README.md").read_bytes() == b"# Second\n"
    assert run_git("rev-list", "--count", "HEAD", directory=env.workspace) == "2"
    assert run_git("status", "--porcelain", directory=env.workspace) == ""


@pytest.mark.parametrize("branch", ["feature/deep/name", 'it"s#odd;'])
def test_branch_name_is_preserved(env, branch):
    tip = env.upstream.commit({"new": b"1\n"}, branch=branch)

    assert env.stage(branch=branch) == tip

    assert run_git("symbolic-ref", "--short", "HEAD", directory=env.workspace) == branch
    assert run_git("rev-parse", f"refs/remotes/origin/{branch}", directory=env.workspace) == tip


def test_origin_url_is_the_only_configuration(env):
    env.configure("[http]\n\textraHeader = X-Token: very-secret-token\n[user]\n\tname = Operator")

    env.stage()

    assert run_git("remote", "get-url", "origin", directory=env.workspace) == PUBLIC_URL
    assert "secret" not in (env.workspace / ".git" / "config").read_text()
    assert "secret" not in (env.attempt / "repository.git" / "config").read_text()
    assert not (env.workspace / ".git" / "hooks").exists()


def test_agent_can_commit_branch_diff_and_log(env):
    base = env.stage()

    (env.workspace / "README.md").write_text("# Mine\n")
    run_git("checkout", "--quiet", "-b", "mine", directory=env.workspace)
    run_git("commit", "--quiet", "--all", "--message", "Mine", directory=env.workspace)

    assert "# Mine" in run_git("diff", base, directory=env.workspace)
    assert run_git("log", "--format=%s", directory=env.workspace).splitlines() == ["Mine", "Work"]


def test_workspace_objects_are_not_hard_links_to_the_repository(env):
    env.stage()

    objects = [path for path in (env.workspace / ".git").rglob("*") if path.is_file()]

    assert any(path.suffix == ".pack" for path in objects)
    assert {path.stat().st_nlink for path in objects} == {1}


def test_subpath_may_be_any_directory(env):
    env.stage(subpath="src")
    env.stage(subpath="./src/")


@pytest.mark.parametrize("subpath", ["nowhere", "README.md", "link", "link/below", "src/app.py"])
def test_subpath_that_is_not_a_directory_fails(env, subpath):
    (env.upstream.work / "link").symlink_to("src")
    (env.upstream.work / "src" / "below").mkdir()
    (env.upstream.work / "src" / "below" / "file").write_text("")
    env.upstream.commit_all()

    with pytest.raises(AttemptError, match=rf"'{subpath}' is not a directory in branch 'main'") as raised:
        env.stage(subpath=subpath)

    assert raised.value.code == "clone_failed"


def test_staging_after_a_crash_starts_over(env, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("kept")
    env.workspace.mkdir(parents=True)
    (env.workspace / "left").write_text("half a clone")
    (env.workspace / "link").symlink_to(outside)
    (env.attempt / "repository.git").symlink_to(outside)

    env.stage()

    assert not (env.workspace / "left").exists()
    assert (env.workspace / "README.md").exists()
    assert (outside / "precious").read_text() == "kept"


def test_sha256_repository_is_supported(make_env):
    env = make_env("--object-format=sha256")
    base = env.upstream.commit({"a": b"1\n"})

    assert env.stage() == base

    assert len(base) == 64
    run_git("fsck", directory=env.workspace)
    (env.workspace / "a").write_text("2\n")
    assert env.verify_patch(base)


def test_submodules_remain_empty_directories(env):
    run_git(*("update-index", "--add", "--cacheinfo", f"160000,{'1' * 40},vendor/lib"), directory=env.upstream.work)
    (env.upstream.work / ".gitmodules").write_text(
        '[submodule "lib"]\n\tpath = vendor/lib\n\turl = https://git.example/demo.git\n'
    )
    run_git("add", ".gitmodules", directory=env.upstream.work)
    run_git("commit", "--quiet", "--message", "Submodule", directory=env.upstream.work)
    env.upstream.push()

    base = env.stage()

    assert list((env.workspace / "vendor" / "lib").iterdir()) == []
    assert env.patch(base) == b""


def test_lfs_pointers_remain_pointers(env):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5\n"
    base = env.upstream.commit({".gitattributes": b"*.bin filter=lfs diff=lfs merge=lfs -text\n", "x.bin": pointer})

    assert env.stage() == base

    assert (env.workspace / "x.bin").read_bytes() == pointer


def test_attributes_do_not_convert_files(env):
    content = b"one\r\ntwo\n$Id$\n"
    work = env.upstream.work
    attributes = b"* text eol=crlf ident working-tree-encoding=UTF-16\n"
    for name, stored in {"mixed.txt": content, ".gitattributes": attributes}.items():
        blob = run_git("hash-object", "-w", "--no-filters", "--stdin", directory=work, stdin=stored)
        run_git("update-index", "--add", "--cacheinfo", f"100644,{blob},{name}", directory=work)
    run_git("commit", "--quiet", "--message", "Mixed", directory=work)
    base = env.upstream.push()

    env.stage()

    assert (env.workspace / "mixed.txt").read_bytes() == content
    assert run_git("status", "--porcelain", directory=env.workspace) == ""
    assert env.patch(base) == b""


def test_legacy_commit_format_errors_are_tolerated(env):
    work = env.upstream.work
    tree = run_git("rev-parse", "HEAD^{tree}", directory=work)
    commit = f"tree {tree}\nauthor A<a@example.org> 0 +051800\ncommitter A <a@example.org> 0 +0000\n\nOld\n"
    name = run_git(
        *("hash-object", "-t", "commit", "-w", "--stdin", "--literally"), directory=work, stdin=commit.encode()
    )
    run_git("reset", "--quiet", "--hard", name, directory=work)

    assert env.stage() != name
    assert env.upstream.push() == name
    assert env.stage() == name


def test_credentials_come_from_the_server_users_configuration(env):
    store = env.root / "home" / "credentials"
    store.parent.mkdir()
    env.server.credentials = "me:let-me-in"
    with pytest.raises(AttemptError, match="needs credentials"):
        env.stage()

    host = env.server.url.removeprefix("http://")
    store.write_text(f"http://me:let-me-in@{host}\n")
    env.configure(f"[credential]\n\thelper = store --file={store}")
    env.stage()

    assert (env.workspace / "README.md").exists()


def test_credentials_from_an_extra_header_are_used(env):
    env.server.credentials = "me:let-me-in"
    env.configure(f'[http "{env.server.url}"]\n\textraHeader = Authorization: Basic bWU6bGV0LW1lLWlu')

    env.stage()

    assert (env.workspace / "README.md").exists()


def test_default_configuration_files_of_the_user_are_read(env):
    home, config = env.root / "home", env.root / "xdg"
    (config / "git").mkdir(parents=True)
    home.mkdir()
    shutil.copy(env.config, config / "git" / "config")
    home.joinpath(".gitconfig").write_text(
        f'[http "{env.server.url}"]\n\textraHeader = Authorization: Basic bWU6bGV0LW1lLWlu\n'
    )
    env.server.credentials = "me:let-me-in"
    env.variables = {"PATH": os.environ["PATH"], "HOME": str(home), "XDG_CONFIG_HOME": str(config)}

    env.stage()

    assert (env.workspace / "README.md").exists()


@pytest.mark.parametrize("url", ["ssh://git@git.example/{path}", "git@git.example:{path}"])
def test_ssh_command_of_the_servers_user_is_used(env, url):
    ssh = env.root / "ssh"
    # Simulates ssh: logs its arguments and runs the last one, as the remote end would.
    ssh.write_text(f'#!/bin/sh\necho "$@" >> {env.root}/calls\nfor command; do :; done\nexec sh -c "$command"\n')
    ssh.chmod(0o755)
    env.configure(f"[core]\n\tsshCommand = {ssh} -4\n[ssh]\n\tvariant = ssh")

    env.stage(url.format(path=str(env.upstream.bare).lstrip("/") if "://" in url else env.upstream.bare))

    assert (env.workspace / "README.md").exists()
    assert "-4 " in (env.root / "calls").read_text()
    assert "git@git.example git-upload-pack" in (env.root / "calls").read_text()


LONG_BANNER = "#!/bin/sh\nhead -c 200000 /dev/zero | tr '\\0' 'x' | timeout 5 cat >&2 || exit 1\necho >&2\n"
"""Simulates an ssh that prints a long banner and aborts if the banner is not read."""


@pytest.mark.parametrize("is_confined", [True, False])
def test_long_ssh_banner_is_read(env, is_confined):
    env.confined = is_confined
    ssh = env.root / "ssh"
    ssh.write_text(f'{LONG_BANNER}for command; do :; done\nexec sh -c "$command"\n')
    ssh.chmod(0o755)
    env.configure(f"[core]\n\tsshCommand = {ssh}\n[ssh]\n\tvariant = ssh")

    env.stage(f"git@git.example:{env.upstream.bare}")

    assert (env.workspace / "README.md").exists()


@pytest.mark.parametrize("banner", ["#!/bin/sh\n", LONG_BANNER])
def test_last_line_of_ssh_output_is_explained(env, banner):
    ssh = env.root / "ssh"
    ssh.write_text(f"{banner}echo 'Host key verification failed.' >&2\nexit 255\n")
    ssh.chmod(0o755)
    env.configure(f"[core]\n\tsshCommand = {ssh}\n[ssh]\n\tvariant = ssh")

    with pytest.raises(AttemptError, match="known_hosts"):
        env.stage(f"git@git.example:{env.upstream.bare}")
