"""The demo's own server leaves the telling to the demo."""

from sandbox.demo.processes import start_server


def test_what_keeps_it_from_taking_tasks_is_told_by_who_submits_one(tmp_path, capfd):
    with start_server(tmp_path / "data", {"ANTHROPIC_API_KEY": "", "ANTHROPIC_AUTH_TOKEN": ""}) as server:
        assert server["http"].startswith("http://127.0.0.1:")
    assert capfd.readouterr().err == ""
