"""`sandbox config` shows the settings and their origins; `sandbox token` creates, lists and revokes tokens."""

import json
import subprocess
import tomllib
from pathlib import Path

import pytest


@pytest.fixture
def write_config(environment, tmp_path):
    """Write `sandbox.toml` to the default path of the CLI."""
    environment["XDG_CONFIG_HOME"] = str(tmp_path / "config")
    environment["XDG_DATA_HOME"] = str(tmp_path / "data")

    def write(text: str):
        file = tmp_path / "config" / "sandbox" / "sandbox.toml"
        file.parent.mkdir(parents=True)
        file.write_text(text)
        return file

    return write


def test_config_show_prints_a_valid_configuration(run_cli, write_config, tmp_path):
    write_config('[git]\nallowed_hosts = ["github.com"]\n[secrets.vault]\naddress = "https://vault.example.org"\n')
    result = run_cli("config", "show", "--origin", "--port", "9")
    assert result.returncode == 0, result.stderr
    settings = tomllib.loads(result.stdout.decode())
    assert settings["server"]["port"] == 9
    assert settings["git"]["allowed_hosts"] == ["github.com"]
    (tmp_path / "again.toml").write_bytes(result.stdout)
    reloaded = run_cli("config", "show", "--config", str(tmp_path / "again.toml"))
    assert tomllib.loads(reloaded.stdout.decode()) == settings


def test_config_show_prints_the_origin_of_each_value(run_cli, write_config, environment):
    file = write_config("[server]\nws_port = 3\n")
    environment["SANDBOX_ACCESS_REQUESTS_PER_MINUTE"] = "10"
    settings = json.loads(run_cli("config", "show", "--origin", "-f", "json", "--port", "9").stdout)
    assert settings["server"]["port"] == {"value": 9, "origin": "--port"}
    assert settings["server"]["ws_port"] == {"value": 3, "origin": str(file)}
    assert settings["server"]["host"] == {"value": "127.0.0.1", "origin": "default"}
    assert settings["access"]["requests_per_minute"] == {"value": 10, "origin": "SANDBOX_ACCESS_REQUESTS_PER_MINUTE"}
    plain = json.loads(run_cli("config", "show", "-f", "json").stdout)
    assert plain["secrets"]["vault"] == {"address": None, "mount": "secret"}


def test_config_path_is_printed_even_if_the_file_is_missing(run_cli, write_config):
    missing = run_cli("config", "path", "--config", "/nowhere/sandbox.toml")
    assert (missing.returncode, missing.stdout) == (0, b"/nowhere/sandbox.toml\n")
    assert b"This file does not exist" in missing.stderr
    file = write_config("")
    existing = run_cli("config", "path")
    assert (existing.stdout.decode(), existing.stderr) == (f"{file}\n", b"")


def test_config_errors_are_usage_errors_and_escaped(run_cli, write_config):
    write_config('[server]\nport = "x"\n"\\u001b[31m" = 1\n')
    for command in (("config", "show"), ("serve",), ("doctor",), ("token", "list")):
        result = run_cli(*command)
        assert (result.returncode, result.stdout) == (2, b"")
        assert b"has 2 errors:\n" in result.stderr
        assert b"\x1b" not in result.stderr


def test_empty_option_is_a_usage_error(run_cli, write_config, tmp_path):
    write_config("")
    for command in (("serve",), ("doctor",), ("config", "show"), ("token", "create", "--role", "viewer")):
        result = run_cli(*command, "--data-dir", "")
        assert (result.returncode, result.stdout) == (2, b"")
        assert b"server.data_dir (--data-dir) must not be empty" in result.stderr
    result = run_cli("config", "path", "--config", "")
    assert (result.returncode, result.stdout, result.stderr) == (2, b"", b"Error: --config must not be empty.\n")
    assert not list(tmp_path.glob("tokens.*"))


@pytest.mark.parametrize("output", ["text", "json"])
def test_error_names_the_new_token_if_it_cannot_be_printed(run_cli, start_cli, write_config, output):
    write_config("")
    with Path("/dev/full").open("wb") as full:
        command = ("token", "create", "--role", "viewer", "-f", output)
        created = start_cli(*command, stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE)
        errors = created.stderr.read()
        assert created.wait(30) == 10
    tokens = json.loads(run_cli("token", "list", "-f", "json").stdout)["tokens"]
    assert f"Revoke it: sandbox token revoke {tokens[0]['id']}".encode() in errors
    assert b"Revoke it" not in run_cli(*command).stderr


def test_created_token_is_printed_once(run_cli, write_config):
    write_config("")
    created = run_cli("token", "create", "--role", "viewer", "--name", "wall", "--expires-in", "90d")
    token = created.stdout.decode().strip()
    assert created.returncode == 0
    assert token.startswith("sbx_")
    assert token.encode() not in created.stderr
    listing = run_cli("token", "list")
    assert b"wall" in listing.stdout
    assert token.rpartition("_")[2].encode() not in listing.stdout
    (record,) = json.loads(run_cli("token", "list", "-f", "json").stdout)["tokens"]
    assert (record["id"], record["role"], record["name"]) == (token.split("_")[1], "viewer", "wall")
    assert record["expires_at"] > record["created_at"]
    assert run_cli("token", "revoke", record["id"]).returncode == 0
    assert b"all requests are denied" in run_cli("token", "list").stderr


def test_operator_token_is_created_with_a_warning_about_missing_git_hosts(run_cli, write_config, environment):
    write_config("")
    created = run_cli("token", "create", "--role", "operator")
    assert created.stdout.startswith(b"sbx_")
    errors = created.stderr.decode()
    assert "git.allowed_hosts" in errors
    assert "SANDBOX_GIT_ALLOWED_HOSTS" in errors
    environment["SANDBOX_GIT_ALLOWED_HOSTS"] = "github.com"
    assert b"allowed_hosts" not in run_cli("token", "create", "--role", "operator").stderr


def test_viewer_token_is_created_with_a_warning_about_missing_git_hosts(run_cli, write_config):
    write_config("")
    created = run_cli("token", "create", "--role", "viewer", "-f", "json")
    assert json.loads(created.stdout)["role"] == "viewer"
    assert b"git.allowed_hosts" in created.stderr


def test_token_name_is_escaped_in_errors(run_cli, write_config):
    write_config("")
    result = run_cli("token", "create", "--role", "viewer", "--name", "\x1b[31mred")
    assert result.returncode == 2
    assert b"\x1b" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [(), ("--role", "king"), ("--role", "viewer", "--expires-in", "soon"), ("--role", "viewer", "--expires-in", "0d")],
)
def test_invalid_role_or_expiry_is_a_usage_error(run_cli, write_config, arguments):
    write_config("")
    assert run_cli("token", "create", *arguments).returncode == 2
    assert b"There are no tokens" in run_cli("token", "list").stderr
