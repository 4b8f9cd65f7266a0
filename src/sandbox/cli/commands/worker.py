"""The `sandbox worker` command, which engines run."""

from __future__ import annotations

import click

from sandbox.cli.click_extensions import command, gc_frozen
from sandbox.cli.settings_options import load_configuration


@command(hidden=True)
@click.argument("attempt_id")
@click.option("--server", required=True, metavar="HOST:PORT", help="Address of the server for workers.")
@click.option("--fingerprint", required=True, metavar="SHA256", help="Fingerprint of the server's certificate.")
def worker(attempt_id: str, server: str, fingerprint: str) -> None:
    """Run the attempts of one task on this host.

    An engine starts workers. A worker needs:

    \b
    - a credential of its job: the join token in SANDBOX_JOIN_TOKEN or, with Kubernetes,
      the path of the file with the identity token in SANDBOX_IDENTITY_FILE
    - if the server requires it, the cluster's host key: cluster.host_key_file, or
      SANDBOX_CLUSTER_HOST_KEY_FILE
    - the engine's name for the host, if it differs from the hostname: SLURMD_NODENAME
      with Slurm, SANDBOX_HOST_NAME with other engines
    - a data directory that no server uses, and a runtime that works on the host
    - the same version of Sandbox as the server

    A worker reads its other settings from the environment and sandbox.toml of its host.
    """
    settings = load_configuration({}).settings
    host, _, port = server.rpartition(":")
    if not host or not port.isdecimal():
        raise click.BadParameter("must be a host and a port", param_hint="--server")
    with gc_frozen():
        from sandbox.bootstrap.worker import run
        from sandbox.worker.worker import ServerAddress
    click.get_current_context().exit(
        run(settings, attempt_id, ServerAddress(host.strip("[]"), int(port), fingerprint.lower()))
    )
