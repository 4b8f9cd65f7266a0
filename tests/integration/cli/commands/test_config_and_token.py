"""`sandbox config` says what holds and why; `sandbox token` makes, lists and revokes."""

import json
import tomllib

import pytest


@pytest.fixture
def written(environment, tmp_path):
    """Write `sandbox.toml` where the command line looks for it."""
    environment["XDG_CONFIG_HOME"] = str(tmp_path / "config")
    environment["XDG_DATA_HOME"] = str(tmp_path / "data")

    def write(text: str):
        file = tmp_path / "config" / "sandbox" / "sandbox.toml"
        file.parent.mkdir(parents=True)
        file.write_text(text)
        return file

    return write


def test_what_is_shown_is_a_configuration_again(sandbox, written, tmp_path):
    written('[git]\nallowed_hosts = ["github.com"]\n[secrets.vault]\naddress = "https://vault.example.org"\n')
    shown = sandbox("config", "show", "--origin", "--port", "9")
    assert shown.returncode == 0, shown.stderr
    settings = tomllib.loads(shown.stdout.decode())
    assert settings["server"]["port"] == 9
    assert settings["git"]["allowed_hosts"] == ["github.com"]
    (tmp_path / "again.toml").write_bytes(shown.stdout)
    again = sandbox("config", "show", "--config", str(tmp_path / "again.toml"))
    assert tomllib.loads(again.stdout.decode()) == settings


def test_each_value_has_its_origin(sandbox, written, environment):
    file = written("[server]\nws_port = 3\n")
    environment["SANDBOX_ACCESS_REQUESTS_PER_MINUTE"] = "10"
    shown = json.loads(sandbox("config", "show", "--origin", "-f", "json", "--port", "9").stdout)
    assert shown["server"]["port"] == {"value": 9, "origin": "--port"}
    assert shown["server"]["ws_port"] == {"value": 3, "origin": str(file)}
    assert shown["server"]["host"] == {"value": "127.0.0.1", "origin": "default"}
    assert shown["access"]["requests_per_minute"] == {"value": 10, "origin": "SANDBOX_ACCESS_REQUESTS_PER_MINUTE"}
    plain = json.loads(sandbox("config", "show", "-f", "json").stdout)
    assert plain["secrets"]["vault"] == {"address": None, "mount": "secret"}


def test_the_place_of_the_file_is_told_whether_it_is_there_or_not(sandbox, written):
    missing = sandbox("config", "path", "--config", "/nowhere/sandbox.toml")
    assert (missing.returncode, missing.stdout) == (0, b"/nowhere/sandbox.toml\n")
    assert b"no such file" in missing.stderr
    file = written("")
    found = sandbox("config", "path")
    assert (found.stdout.decode(), found.stderr) == (f"{file}\n", b"")


def test_mistakes_are_usage_errors_that_steer_no_terminal(sandbox, written):
    written('[server]\nport = "x"\n"\\u001b[31m" = 1\n')
    for command in (("config", "show"), ("serve",), ("doctor",), ("token", "list")):
        refused = sandbox(*command)
        assert (refused.returncode, refused.stdout) == (2, b"")
        assert b"has 2 mistakes:\n" in refused.stderr
        assert b"\x1b" not in refused.stderr


def test_an_option_that_an_unset_variable_left_empty_is_a_usage_error(sandbox, written, tmp_path):
    written("")
    for command in (("serve",), ("doctor",), ("config", "show"), ("token", "create", "--role", "viewer")):
        refused = sandbox(*command, "--data-dir", "")
        assert (refused.returncode, refused.stdout) == (2, b"")
        assert b"server.data_dir (--data-dir) must not be empty" in refused.stderr
    refused = sandbox("config", "path", "--config", "")
    assert (refused.returncode, refused.stdout, refused.stderr) == (2, b"", b"Error: --config must not be empty.\n")
    assert not list(tmp_path.glob("tokens.*"))


def test_a_token_is_printed_alone_and_once(sandbox, written):
    written("")
    made = sandbox("token", "create", "--role", "viewer", "--name", "wall", "--expires-in", "90d")
    token = made.stdout.decode().strip()
    assert made.returncode == 0
    assert token.startswith("sbx_")
    assert token.encode() not in made.stderr
    listed = sandbox("token", "list")
    assert b"wall" in listed.stdout
    assert token.rpartition("_")[2].encode() not in listed.stdout
    (shown,) = json.loads(sandbox("token", "list", "-f", "json").stdout)["tokens"]
    assert (shown["id"], shown["role"], shown["name"]) == (token.split("_")[1], "viewer", "wall")
    assert shown["expires_at"] > shown["created_at"]
    assert sandbox("token", "revoke", shown["id"]).returncode == 0
    assert b"nobody is let in" in sandbox("token", "list").stderr


def test_who_makes_a_token_is_told_that_no_host_may_be_cloned_from_yet(sandbox, written, environment):
    written("")
    made = sandbox("token", "create", "--role", "operator")
    assert made.stdout.startswith(b"sbx_")
    told = made.stderr.decode()
    assert "git.allowed_hosts" in told
    assert "SANDBOX_GIT_ALLOWED_HOSTS" in told
    environment["SANDBOX_GIT_ALLOWED_HOSTS"] = "github.com"
    assert b"allowed_hosts" not in sandbox("token", "create", "--role", "operator").stderr


def test_who_makes_a_token_for_looking_on_is_told_too(sandbox, written):
    written("")
    made = sandbox("token", "create", "--role", "viewer", "-f", "json")
    assert json.loads(made.stdout)["role"] == "viewer"
    assert b"git.allowed_hosts" in made.stderr


def test_a_name_is_shown_as_text(sandbox, written):
    written("")
    refused = sandbox("token", "create", "--role", "viewer", "--name", "\x1b[31mred")
    assert refused.returncode == 2
    assert b"\x1b" not in refused.stderr


@pytest.mark.parametrize(
    "arguments",
    [(), ("--role", "king"), ("--role", "viewer", "--expires-in", "soon"), ("--role", "viewer", "--expires-in", "0d")],
)
def test_a_token_without_a_proper_role_or_end_is_a_usage_error(sandbox, written, arguments):
    written("")
    assert sandbox("token", "create", *arguments).returncode == 2
    assert b"There are no tokens" in sandbox("token", "list").stderr
