"""The server that the demo starts."""

from sandbox.demo.walkthrough import start_server


def test_started_server_prints_no_warnings(tmp_path, capfd):
    with start_server(tmp_path / "data", {"ANTHROPIC_API_KEY": "", "ANTHROPIC_AUTH_TOKEN": ""}) as server:
        assert server["http"].startswith("http://127.0.0.1:")
    assert capfd.readouterr().err == ""
