"""The `sandbox serve` command."""

from __future__ import annotations

from typing import Any

from sandbox.cli.click_extensions import command, gc_frozen, help_examples
from sandbox.cli.options import current_options, output_options
from sandbox.cli.settings_options import load_configuration, settings_options


@command(
    epilog=help_examples(
        "sandbox serve",
        "sandbox serve --port 9122 --data-dir /srv/sandbox",
        note="Before you start the server, set the model API key of the agent in the environment. Sandboxes have no "
        "access to this key. If the key is missing, the server prints the name of the setting when it starts.",
    )
)
@settings_options
@output_options("text", "json")
def serve(**options: Any) -> None:
    """Run the server.

    The server runs until it is stopped (SIGINT or SIGTERM). With --format json, the server prints its addresses as one
    line of JSON when it is ready. All other settings come from sandbox.toml or the environment; see `sandbox config
    show`.
    """
    settings = load_configuration(options).settings
    with gc_frozen():
        from sandbox.bootstrap.server import run
    run(settings, announce="json" if current_options().format == "json" else "text")
