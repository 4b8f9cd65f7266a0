"""The contexts file, and the selection of the server and the token."""

import json
import os
import stat
import threading

import pytest

from sandbox.cli.contexts import (
    DEFAULT_CONTEXT,
    Context,
    ContextError,
    ContextFile,
    ContextNotFoundError,
    Contexts,
    ServerSelection,
    check_name,
    default_file,
    select_context,
)

PROD, DEV = Context("https://prod.example.com", "prod-token"), Context("http://localhost:9122")
STORED = Contexts({"prod": PROD, "dev": DEV}, "prod")


@pytest.fixture
def file(tmp_path):
    return ContextFile(tmp_path / "sandbox" / "contexts.json")


@pytest.fixture
def stored(file):
    with file.locked():
        file.save(STORED)
    return file


def test_contexts_are_stored_in_a_private_file(stored):
    assert stored.load() == STORED
    assert stat.S_IMODE(stored.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(stored.path.parent.stat().st_mode) == 0o700
    assert [path.name for path in stored.path.parent.iterdir()] == ["contexts.json"]


def test_only_the_default_context_exists_without_a_file(file):
    assert file.load() == Contexts()
    assert file.load().find("default") == DEFAULT_CONTEXT == Context("http://localhost:8122", "")


def test_token_is_not_part_of_the_representation():
    assert "prod-token" not in repr(STORED)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o644])
def test_file_that_other_users_can_access_is_refused(stored, mode):
    stored.path.chmod(mode)
    with pytest.raises(ContextError, match=f"fix it with: chmod 600 {stored.path}"):
        stored.load()
    stored.path.chmod(0o600)
    assert stored.load() == STORED


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can create a file of another user")
def test_file_of_another_user_is_refused(stored):
    os.chown(stored.path, 12345, 12345)
    with pytest.raises(ContextError, match="so the user who runs this command must own it"):
        stored.load()


def test_named_pipe_is_refused_without_blocking(file):
    file.path.parent.mkdir()
    os.mkfifo(file.path, 0o600)
    with pytest.raises(ContextError, match="so the user who runs this command must own it"):
        file.load()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b'{"version": 2, "current": "default", "contexts": {}}',
        b'{"version": 1, "current": "default", "contexts": {"a b": {"server": "http://a"}}}',
        b'{"version": 1, "current": "default", "contexts": {"a": {"token": "t"}}}',
        b'{"version": 1, "current": "default", "contexts": {"a": {"server": 1}}}',
        b'{"version": 1, "current": "default", "contexts": {}}' + b" " * 2**20,
    ],
)
def test_damaged_file_is_reported(stored, content):
    stored.path.write_bytes(content)
    with pytest.raises(ContextError, match="is damaged; remove it"):
        stored.load()


def test_failed_change_leaves_the_file_unchanged(stored, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        stored.save(Contexts())
    assert stored.load() == STORED
    assert [path.name for path in stored.path.parent.iterdir()] == ["contexts.json"]


def test_symbolic_link_to_the_file_is_preserved(stored, tmp_path):
    target = tmp_path / "dotfiles" / "contexts.json"
    target.parent.mkdir()
    stored.path.rename(target)
    stored.path.symlink_to(target)
    stored.save(STORED.remove("dev"))
    assert stored.path.is_symlink()
    assert json.loads(target.read_bytes())["contexts"].keys() == {"prod"}


def test_concurrent_changes_are_not_lost(file):
    def add(number):
        with file.locked():
            file.save(file.load().add(f"c{number}", DEV))

    threads = [threading.Thread(target=add, args=[number]) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(file.load().by_name) == 10


def test_use_add_and_remove_return_changed_contexts():
    assert STORED.use("dev") == Contexts(STORED.by_name, "dev")
    assert STORED.use("default").current == "default"
    assert STORED.add("new", DEV) == Contexts({**STORED.by_name, "new": DEV}, "new")
    assert STORED.remove("dev") == Contexts({"prod": PROD}, "prod")
    assert STORED.remove("prod") == Contexts({"dev": DEV}, "default")
    with pytest.raises(ContextError, match="cannot be removed"):
        STORED.remove("default")


@pytest.mark.parametrize("change", [Contexts.find, Contexts.use, Contexts.remove])
def test_unknown_context_is_reported_with_a_similar_name(change):
    with pytest.raises(ContextNotFoundError, match=r"^There is no context 'prdo'; did you mean prod\?$"):
        change(STORED, "prdo")
    with pytest.raises(ContextNotFoundError, match="list them with: sandbox context list"):
        change(STORED, "zzz")


@pytest.mark.parametrize("name", ["", "default", "a b", "-a", "a-", "a/b", "../a", "ä", "a\n", "a" * 65])
def test_invalid_name_is_refused(name):
    with pytest.raises(ContextError, match="cannot be the name of a context"):
        check_name(name)


@pytest.mark.parametrize("name", ["prod", "a", "sandbox.example.com", "localhost-9122", "a_b", "a" * 64])
def test_valid_name_is_accepted(name):
    assert check_name(name) == name


def test_file_is_in_the_configuration_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/config")
    assert str(default_file()) == "/config/sandbox/contexts.json"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    assert str(default_file()) == "/home/me/.config/sandbox/contexts.json"


URL, OTHER = "http://option", "http://variable"


@pytest.mark.parametrize(
    ("options", "variables", "selected"),
    [
        (ServerSelection(), ServerSelection(), PROD),
        (ServerSelection(), ServerSelection("", "", ""), PROD),
        (ServerSelection(), ServerSelection(context="dev"), DEV),
        (ServerSelection(), ServerSelection(token="t"), Context(PROD.server, "t")),
        (ServerSelection(), ServerSelection(token="t", context="dev"), Context(DEV.server, "t")),
        (ServerSelection(), ServerSelection(OTHER), Context(OTHER, "")),
        (ServerSelection(), ServerSelection(OTHER, "t"), Context(OTHER, "t")),
        (ServerSelection(token="o"), ServerSelection(), Context(PROD.server, "o")),
        (ServerSelection(token="o"), ServerSelection(OTHER, "t"), Context(OTHER, "o")),
        (ServerSelection(URL), ServerSelection(), Context(URL, "")),
        (ServerSelection(URL), ServerSelection(OTHER, "t"), Context(URL, "t")),
        (ServerSelection(URL), ServerSelection(context="dev"), Context(URL, "")),
        (ServerSelection(URL, "o"), ServerSelection(OTHER, "t"), Context(URL, "o")),
        (ServerSelection(context="prod"), ServerSelection(OTHER, "t", "dev"), PROD),
        (ServerSelection(context="dev"), ServerSelection(OTHER, "t"), DEV),
        (ServerSelection(token="o", context="dev"), ServerSelection(OTHER, "t"), Context(DEV.server, "o")),
        (ServerSelection(context="default"), ServerSelection(OTHER, "t"), DEFAULT_CONTEXT),
        (ServerSelection(PROD.server), ServerSelection(), PROD),
        (
            ServerSelection("https://PROD.example.com:443/"),
            ServerSelection(),
            Context("https://PROD.example.com:443/", PROD.token),
        ),
        (ServerSelection(PROD.server), ServerSelection(OTHER, context="dev"), PROD),
        (ServerSelection(PROD.server, "o"), ServerSelection(), Context(PROD.server, "o")),
        (ServerSelection(PROD.server), ServerSelection(token="t"), Context(PROD.server, "t")),
        (ServerSelection(), ServerSelection(PROD.server), PROD),
        (ServerSelection(), ServerSelection(PROD.server, "t"), Context(PROD.server, "t")),
    ],
)
def test_options_override_variables_and_variables_override_the_current_context(stored, options, variables, selected):
    """The token of a context is never sent to another server."""
    assert select_context(options, variables, stored) == selected


@pytest.mark.parametrize(
    "url",
    [
        "http://prod.example.com",
        "https://prod.example.com:444",
        "https://prod.example.com/path",
        "https://prod.example.com.evil.example",
        "https://prod.example.com@evil.example",
        "https://evil.example#prod.example.com",
        "https://prod.example.com.",
        "https://localhost:9122",
        "prod.example.com",
        "",
    ],
)
def test_token_is_not_sent_to_another_server(stored, url):
    for options, variables in (
        (ServerSelection(url), ServerSelection(context="dev")),
        (ServerSelection(context="dev"), ServerSelection(url)),
    ):
        assert select_context(options, variables, stored).token == ""


def test_token_is_not_guessed_if_a_server_has_several(file):
    other = Context(PROD.server, "other-token")
    by_name = {"prod": PROD, "other": other, "dev": DEV}
    for current, token in (("prod", PROD.token), ("other", other.token), ("dev", "")):
        with file.locked():
            file.save(Contexts(by_name, current))
        assert select_context(ServerSelection(PROD.server), ServerSelection(), file).token == token


@pytest.mark.parametrize(
    ("options", "variables"),
    [
        (ServerSelection(URL, context="dev"), ServerSelection()),
        (ServerSelection(), ServerSelection(OTHER, context="dev")),
        (ServerSelection(context="nope"), ServerSelection()),
        (ServerSelection(), ServerSelection(context="nope")),
    ],
)
def test_contradictory_and_unknown_selections_are_refused(stored, options, variables):
    with pytest.raises(ContextError):
        select_context(options, variables, stored)


@pytest.mark.parametrize(
    ("options", "variables"),
    [
        (ServerSelection(URL), ServerSelection()),
        (ServerSelection(), ServerSelection(OTHER)),
        (ServerSelection(PROD.server), ServerSelection()),
    ],
)
def test_unreadable_file_is_ignored_if_a_server_is_given(stored, options, variables):
    stored.path.chmod(0o644)
    assert select_context(options, variables, stored).token == ""
