"""`sandbox login` and `sandbox context`, and the server and token that other commands use afterwards."""

import json
import stat

import pytest

from doubles.fake_api import FakeApi, error_response, json_response

EMPTY_TASK_LIST = {"tasks": [], "total_count": 0}
TOKEN = "sbx_abcdefgh_" + "0" * 64


@pytest.fixture
def environment(environment):
    """The environment without a server, as for a new user."""
    del environment["SANDBOX_SERVER"]
    return environment


@pytest.fixture
def file(tmp_path):
    return tmp_path / ".config" / "sandbox" / "contexts.json"


@pytest.fixture
def requires_token(api):
    """Make the server accept only TOKEN."""

    def respond(request):
        if request.headers.get("authorization") == f"Bearer {TOKEN}":
            return json_response(EMPTY_TASK_LIST)
        return error_response(401, "unauthorized", "This token is unknown.")

    api.on("GET", "/tasks", respond)


def test_accepted_token_is_stored_and_used(run_cli, api, requires_token, file):
    result = run_cli("login", api.url, "--context", "prod", stdin=f"{TOKEN}\n".encode())
    assert (result.returncode, result.stdout) == (0, b"")
    assert result.stderr.decode() == f"Logged in to {api.url}. The current context is now prod.\n"
    stored = {"version": 1, "current": "prod", "contexts": {"prod": {"server": api.url, "token": TOKEN}}}
    assert json.loads(file.read_bytes()) == stored
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [request.headers.get("authorization") for request in api.requests] == [None, f"Bearer {TOKEN}"]
    for arguments in ((), ("--context", "prod")):
        assert run_cli("task", "list", *arguments).returncode == 0
        assert api.requests[-1].headers["authorization"] == f"Bearer {TOKEN}"


@pytest.mark.parametrize("typed", [b"wrong\n", b"", b" \n", b"two words\n", "ä\n".encode()])
def test_rejected_token_is_not_stored(run_cli, api, requires_token, file, typed):
    result = run_cli("login", api.url, stdin=typed)
    assert result.returncode in {2, 5}
    assert not file.exists()
    assert typed.strip() not in result.stderr or not typed.strip()


def test_rejected_token_does_not_replace_the_stored_one(run_cli, api, requires_token, file):
    assert run_cli("login", api.url, stdin=TOKEN.encode()).returncode == 0
    before = file.read_bytes()
    result = run_cli("login", api.url, stdin=b"wrong")
    assert (result.returncode, file.read_bytes()) == (5, before)
    assert b"rejected the token" in result.stderr


def test_token_is_entered_at_a_prompt_without_echo(on_terminal, terminal, api, requires_token, file):
    process = on_terminal("login", api.url)
    terminal.read_until(b"Token for http://127.0.0.1")
    terminal.type(TOKEN.encode() + b"\n")
    output = terminal.read_until(b"Logged in to")
    process.wait(30)
    assert TOKEN.encode() not in output
    assert TOKEN in file.read_text()


def test_login_to_a_server_without_tokens_stores_no_token(run_cli, api, file):
    api.on("GET", "/tasks", json_response(EMPTY_TASK_LIST))
    assert run_cli("login", api.url.removeprefix("http://"), stdin=b"secret").returncode == 0
    [name] = json.loads(file.read_bytes())["contexts"]
    assert name == api.url.removeprefix("http://").replace(":", "-")
    assert json.loads(file.read_bytes())["contexts"] == {name: {"server": api.url}}
    assert api.requests[-1].headers.get("authorization") is None


def test_token_as_an_argument_is_refused(run_cli, api):
    for arguments in (("--token", TOKEN, "login", api.url), ("login", api.url, "--token", TOKEN)):
        assert run_cli(*arguments).returncode == 2
    assert api.requests == []


def test_unreachable_server_is_not_stored(run_cli, file):
    assert run_cli("login", "localhost:9").returncode == 6
    assert not file.exists()


@pytest.mark.parametrize("name", ["default", "a b", "../x"])
def test_invalid_name_is_refused(run_cli, api, file, name):
    result = run_cli("login", api.url, "--context", name)
    assert (result.returncode, file.exists(), api.requests) == (2, False, [])


def test_login_to_a_known_context_uses_its_server(run_cli, api, requires_token, file):
    assert run_cli("login", api.url, "--context", "prod", stdin=TOKEN.encode()).returncode == 0
    file.write_text(file.read_text().replace(TOKEN, "expired"))
    assert run_cli("task", "list").returncode == 5
    assert run_cli("login", "--context", "prod", stdin=TOKEN.encode()).returncode == 0
    assert run_cli("task", "list").returncode == 0


def test_token_of_a_context_is_not_sent_to_another_server(run_cli, api, requires_token):
    assert run_cli("login", api.url, stdin=TOKEN.encode()).returncode == 0
    with FakeApi().running() as other:
        other.on("GET", "/tasks", json_response(EMPTY_TASK_LIST))
        assert run_cli("task", "list", "--server", other.url).returncode == 0
        assert [request.headers.get("authorization") for request in other.requests] == [None]


def test_token_variable_is_ignored_with_the_context_option(run_cli, environment, api, file):
    api.on("GET", "/tasks", json_response(EMPTY_TASK_LIST))
    assert run_cli("login", api.url, "--context", "open").returncode == 0
    environment["SANDBOX_TOKEN"] = "for-another-server"
    assert run_cli("task", "list", "--context", "open").returncode == 0
    assert api.requests[-1].headers.get("authorization") is None
    assert run_cli("task", "list").returncode == 0
    assert api.requests[-1].headers["authorization"] == "Bearer for-another-server"


def test_file_readable_by_others_is_refused_with_a_remedy(run_cli, api, file):
    api.on("GET", "/tasks", json_response(EMPTY_TASK_LIST))
    assert run_cli("login", api.url).returncode == 0
    file.chmod(0o644)
    for arguments in (("task", "list"), ("context", "list"), ("context", "use", "default"), ("login", api.url)):
        result = run_cli(*arguments)
        assert result.returncode == 2
        assert result.stderr.endswith(f"fix it with: chmod 600 {file}\n".encode())
    file.chmod(0o600)
    assert run_cli("task", "list").returncode == 0


@pytest.fixture
def two_contexts(run_cli, api):
    api.on("GET", "/tasks", json_response(EMPTY_TASK_LIST))
    for name in ("first", "second"):
        assert run_cli("login", api.url, "--context", name).returncode == 0


def test_contexts_are_listed_without_tokens(run_cli, api, requires_token):
    assert run_cli("login", api.url, "--context", "prod", stdin=TOKEN.encode()).returncode == 0
    listed = run_cli("context", "list")
    lines = [line.split() for line in listed.stdout.decode().splitlines()]
    assert lines[1:] == [["default", "http://localhost:8122", "none"], ["*", "prod", api.url, "stored"]]
    assert json.loads(run_cli("context", "list", "-f", "json").stdout) == {
        "current": "prod",
        "contexts": [
            {"name": "default", "server": "http://localhost:8122", "has_token": False},
            {"name": "prod", "server": api.url, "has_token": True},
        ],
    }
    for output in ("text", "table", "json"):
        assert TOKEN.encode() not in run_cli("context", "list", "-f", output).stdout


def test_context_is_used_and_removed(run_cli, api, two_contexts, file):
    assert run_cli("context", "use", "first").stderr.decode() == f"The current context is now first: {api.url}\n"
    assert json.loads(file.read_bytes())["current"] == "first"
    removed = run_cli("context", "remove", "first").stderr.decode()
    assert removed == "Removed the context first.\nThe current context is now default: http://localhost:8122\n"
    assert list(json.loads(file.read_bytes())["contexts"]) == ["second"]
    assert run_cli("context", "remove", "default").returncode == 2


@pytest.mark.parametrize("arguments", [("context", "use", "frist"), ("context", "remove", "frist"), ("task", "list")])
def test_unknown_context_is_reported(run_cli, environment, two_contexts, arguments):
    environment["SANDBOX_CONTEXT"] = "frist"
    result = run_cli(*arguments)
    assert result.returncode == 3
    assert result.stderr.startswith(b"Error: There is no context 'frist'; did you mean first?\n")


def test_overriding_variable_is_reported(run_cli, environment, two_contexts, api):
    environment["SANDBOX_SERVER"] = api.url
    message = b"SANDBOX_SERVER is set and overrides the current context.\n"
    for arguments in (("context", "use", "first"), ("context", "list"), ("login", "--context", "first")):
        assert run_cli(*arguments).stderr.endswith(message)
