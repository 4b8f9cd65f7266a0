"""The `sandbox completion` command."""

from __future__ import annotations

import click

from sandbox.cli.click_extensions import command, help_examples

SHELLS = ("bash", "zsh", "fish")
COMPLETION_VARIABLE = "_SANDBOX_COMPLETE"


@command(
    epilog=help_examples(
        "sandbox completion bash > ~/.local/share/bash-completion/completions/sandbox",
        'sandbox completion zsh > "${fpath[1]}/_sandbox"',
        "sandbox completion fish > ~/.config/fish/completions/sandbox.fish",
    )
)
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print a shell completion script.

    The script completes commands, options, and the ids of the server's latest tasks.
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(click.get_current_context().find_root().command, {}, "sandbox", COMPLETION_VARIABLE).source())
