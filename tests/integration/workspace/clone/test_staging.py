"""A repository becomes a workspace."""

import os
import shutil

import pytest

from doubles.workspace_fixture import PUBLIC_URL, run_git
from sandbox.model.errors import AttemptError


def test_the_branch_is_checked_out_at_its_tip(house):
    tip = house.upstream.commit({"README.md": b"# Second\n"})

    assert house.stage() == tip

    assert (house.workspace / "README.md").read_bytes() == b"# Second\n"
    assert run_git("rev-parse", "HEAD", directory=house.workspace) == tip
    assert run_git("symbolic-ref", "--short", "HEAD", directory=house.workspace) == "main"
    assert run_git("status", "--porcelain", directory=house.workspace) == ""
    run_git("fsck", "--strict", directory=house.workspace)


def test_without_a_commit_the_clone_is_one_commit_deep(house):
    house.upstream.commit({"README.md": b"# Second\n"})

    house.stage()

    assert run_git("rev-list", "--count", "HEAD", directory=house.workspace) == "1"


def test_with_a_commit_the_history_up_to_it_is_there(house):
    second = house.upstream.commit({"README.md": b"# Second\n"})
    house.upstream.commit({"README.md": b"# Third\n"})

    assert house.stage(commit=second[:9].upper()) == second

    assert (house.workspace / "README.md").read_bytes() == b"# Second\n"
    assert run_git("rev-list", "--count", "HEAD", directory=house.workspace) == "2"
    assert run_git("status", "--porcelain", directory=house.workspace) == ""


@pytest.mark.parametrize("branch", ["feature/deep/name", 'it"s#odd;'])
def test_a_branch_keeps_its_name(house, branch):
    tip = house.upstream.commit({"new": b"1\n"}, branch=branch)

    assert house.stage(branch=branch) == tip

    assert run_git("symbolic-ref", "--short", "HEAD", directory=house.workspace) == branch
    assert run_git("rev-parse", f"refs/remotes/origin/{branch}", directory=house.workspace) == tip


def test_origin_is_the_url_of_the_manifest_and_nothing_else_is_configured(house):
    house.configure("[http]\n\textraHeader = X-Token: very-secret-token\n[user]\n\tname = Operator")

    house.stage()

    assert run_git("remote", "get-url", "origin", directory=house.workspace) == PUBLIC_URL
    assert "secret" not in (house.workspace / ".git" / "config").read_text()
    assert "secret" not in (house.attempt / "repository.git" / "config").read_text()
    assert not (house.workspace / ".git" / "hooks").exists()


def test_the_agent_can_commit_branch_diff_and_log(house):
    base = house.stage()

    (house.workspace / "README.md").write_text("# Mine\n")
    run_git("checkout", "--quiet", "-b", "mine", directory=house.workspace)
    run_git("commit", "--quiet", "--all", "--message", "Mine", directory=house.workspace)

    assert "# Mine" in run_git("diff", base, directory=house.workspace)
    assert run_git("log", "--format=%s", directory=house.workspace).splitlines() == ["Mine", "Work"]


def test_the_agents_objects_are_no_hard_links_to_the_hosts(house):
    house.stage()

    objects = [path for path in (house.workspace / ".git").rglob("*") if path.is_file()]

    assert any(path.suffix == ".pack" for path in objects)
    assert {path.stat().st_nlink for path in objects} == {1}


def test_a_subpath_may_be_any_directory(house):
    house.stage(subpath="src")
    house.stage(subpath="./src/")


@pytest.mark.parametrize("subpath", ["nowhere", "README.md", "link", "link/below", "src/app.py"])
def test_a_subpath_that_is_no_real_directory_fails_and_says_so(house, subpath):
    (house.upstream.work / "link").symlink_to("src")
    (house.upstream.work / "src" / "below").mkdir()
    (house.upstream.work / "src" / "below" / "file").write_text("")
    house.upstream.commit_all()

    with pytest.raises(AttemptError, match=rf"'{subpath}' is not a directory in branch 'main'") as raised:
        house.stage(subpath=subpath)

    assert raised.value.code == "clone_failed"


def test_staging_again_after_a_crash_begins_anew(house, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("kept")
    house.workspace.mkdir(parents=True)
    (house.workspace / "left").write_text("half a clone")
    (house.workspace / "link").symlink_to(outside)
    (house.attempt / "repository.git").symlink_to(outside)

    house.stage()

    assert not (house.workspace / "left").exists()
    assert (house.workspace / "README.md").exists()
    assert (outside / "precious").read_text() == "kept"


def test_a_repository_with_sha256_names_works_as_well(make_house):
    house = make_house("--object-format=sha256")
    base = house.upstream.commit({"a": b"1\n"})

    assert house.stage() == base

    assert len(base) == 64
    run_git("fsck", directory=house.workspace)
    (house.workspace / "a").write_text("2\n")
    assert house.patch_applies_whole(base)


def test_submodules_stay_empty_directories(house):
    run_git(*("update-index", "--add", "--cacheinfo", f"160000,{'1' * 40},vendor/lib"), directory=house.upstream.work)
    (house.upstream.work / ".gitmodules").write_text(
        '[submodule "lib"]\n\tpath = vendor/lib\n\turl = https://git.example/demo.git\n'
    )
    run_git("add", ".gitmodules", directory=house.upstream.work)
    run_git("commit", "--quiet", "--message", "Submodule", directory=house.upstream.work)
    house.upstream.push()

    base = house.stage()

    assert list((house.workspace / "vendor" / "lib").iterdir()) == []
    assert house.patch(base) == b""


def test_lfs_pointers_stay_pointers(house):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5\n"
    base = house.upstream.commit({".gitattributes": b"*.bin filter=lfs diff=lfs merge=lfs -text\n", "x.bin": pointer})

    assert house.stage() == base

    assert (house.workspace / "x.bin").read_bytes() == pointer


def test_attributes_change_no_byte(house):
    content = b"one\r\ntwo\n$Id$\n"
    work = house.upstream.work
    attributes = b"* text eol=crlf ident working-tree-encoding=UTF-16\n"
    for name, stored in {"mixed.txt": content, ".gitattributes": attributes}.items():
        blob = run_git("hash-object", "-w", "--no-filters", "--stdin", directory=work, stdin=stored)
        run_git("update-index", "--add", "--cacheinfo", f"100644,{blob},{name}", directory=work)
    run_git("commit", "--quiet", "--message", "Mixed", directory=work)
    base = house.upstream.push()

    house.stage()

    assert (house.workspace / "mixed.txt").read_bytes() == content
    assert run_git("status", "--porcelain", directory=house.workspace) == ""
    assert house.patch(base) == b""


def test_old_faults_in_names_and_dates_are_tolerated(house):
    work = house.upstream.work
    tree = run_git("rev-parse", "HEAD^{tree}", directory=work)
    commit = f"tree {tree}\nauthor A<a@example.org> 0 +051800\ncommitter A <a@example.org> 0 +0000\n\nOld\n"
    name = run_git(
        *("hash-object", "-t", "commit", "-w", "--stdin", "--literally"), directory=work, stdin=commit.encode()
    )
    run_git("reset", "--quiet", "--hard", name, directory=work)

    assert house.stage() != name
    assert house.upstream.push() == name
    assert house.stage() == name


def test_credentials_come_from_the_server_users_configuration(house):
    store = house.root / "home" / "credentials"
    store.parent.mkdir()
    house.server.credentials = "me:let-me-in"
    with pytest.raises(AttemptError, match="needs credentials"):
        house.stage()

    host = house.server.url.removeprefix("http://")
    store.write_text(f"http://me:let-me-in@{host}\n")
    house.configure(f"[credential]\n\thelper = store --file={store}")
    house.stage()

    assert (house.workspace / "README.md").exists()


def test_credentials_may_be_a_header(house):
    house.server.credentials = "me:let-me-in"
    house.configure(f'[http "{house.server.url}"]\n\textraHeader = Authorization: Basic bWU6bGV0LW1lLWlu')

    house.stage()

    assert (house.workspace / "README.md").exists()


def test_without_a_variable_for_it_both_files_of_the_user_are_read(house):
    home, config = house.root / "home", house.root / "xdg"
    (config / "git").mkdir(parents=True)
    home.mkdir()
    shutil.copy(house.config, config / "git" / "config")
    home.joinpath(".gitconfig").write_text(
        f'[http "{house.server.url}"]\n\textraHeader = Authorization: Basic bWU6bGV0LW1lLWlu\n'
    )
    house.server.credentials = "me:let-me-in"
    house.variables = {"PATH": os.environ["PATH"], "HOME": str(home), "XDG_CONFIG_HOME": str(config)}

    house.stage()

    assert (house.workspace / "README.md").exists()


@pytest.mark.parametrize("url", ["ssh://git@git.example/{path}", "git@git.example:{path}"])
def test_ssh_goes_by_the_command_of_the_servers_user(house, url):
    ssh = house.root / "ssh"
    # Plays ssh: notes its arguments and runs the last one, as the far end would.
    ssh.write_text(f'#!/bin/sh\necho "$@" >> {house.root}/calls\nfor command; do :; done\nexec sh -c "$command"\n')
    ssh.chmod(0o755)
    house.configure(f"[core]\n\tsshCommand = {ssh} -4\n[ssh]\n\tvariant = ssh")

    house.stage(url.format(path=str(house.upstream.bare).lstrip("/") if "://" in url else house.upstream.bare))

    assert (house.workspace / "README.md").exists()
    assert "-4 " in (house.root / "calls").read_text()
    assert "git@git.example git-upload-pack" in (house.root / "calls").read_text()


TALKATIVE = "#!/bin/sh\nhead -c 200000 /dev/zero | tr '\\0' 'x' | timeout 5 cat >&2 || exit 1\necho >&2\n"
"""Plays an ssh with a long banner, which gives up where nobody reads it."""


@pytest.mark.parametrize("is_confined", [True, False])
def test_an_ssh_that_says_much_is_listened_to(house, is_confined):
    house.confined = is_confined
    ssh = house.root / "ssh"
    ssh.write_text(f'{TALKATIVE}for command; do :; done\nexec sh -c "$command"\n')
    ssh.chmod(0o755)
    house.configure(f"[core]\n\tsshCommand = {ssh}\n[ssh]\n\tvariant = ssh")

    house.stage(f"git@git.example:{house.upstream.bare}")

    assert (house.workspace / "README.md").exists()


@pytest.mark.parametrize("talk", ["#!/bin/sh\n", TALKATIVE])
def test_what_an_ssh_says_last_is_understood(house, talk):
    ssh = house.root / "ssh"
    ssh.write_text(f"{talk}echo 'Host key verification failed.' >&2\nexit 255\n")
    ssh.chmod(0o755)
    house.configure(f"[core]\n\tsshCommand = {ssh}\n[ssh]\n\tvariant = ssh")

    with pytest.raises(AttemptError, match="known_hosts"):
        house.stage(f"git@git.example:{house.upstream.bare}")
