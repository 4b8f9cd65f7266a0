"""The `sandbox profile …` commands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from subprocess import SubprocessError
from typing import TYPE_CHECKING, Any

import click

from sandbox.cli.click_extensions import SuggestingGroup, help_examples
from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.options import current_options, output_options
from sandbox.cli.output.console import escape_text, print_json, stdout_console
from sandbox.cli.output.formatting import pluralize
from sandbox.cli.settings_options import data_dir_options, load_configuration
from sandbox.interfaces.runtime import TIERS
from sandbox.model.display_text import format_size

if TYPE_CHECKING:
    from sandbox.images.image_builder import Component
    from sandbox.images.image_store import ImageMetadata
    from sandbox.images.profiles import ProfileCatalog, ProfileEntry

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group(
    cls=SuggestingGroup,
    epilog=help_examples(
        "sandbox profile list",
        "sandbox profile build agentic-dev",
    ),
)
def profile() -> None:
    """Manage sandbox images.

    These commands work directly on the data directory, so run them on the server's machine. The server does not have to
    be running; a running server uses the changes immediately.
    """


@profile.command("list", epilog=help_examples("sandbox profile list"))
@data_dir_options
@output_options("text", "json", "table")
def list_profiles(**options: Any) -> None:
    """List the profiles."""
    entries = _catalog(options).entries()
    if current_options().format == "json":
        print_json({"profiles": [_profile_json(entry) for entry in entries]})
    else:
        _print_table(entries)


@profile.command(epilog=help_examples("sandbox profile show agentic-dev"))
@click.argument("name")
@data_dir_options
@output_options("text", "json")
def show(*, name: str, **options: Any) -> None:
    """Show a profile and its image."""
    with _translate_errors():
        entry = _catalog(options).find(name)
    if current_options().format == "json":
        print_json(
            {**_profile_json(entry), "versions": dict(entry.metadata.package_versions) if entry.metadata else {}}
        )
        return
    for label, text in _detail_lines(entry):
        click.echo(f"{label + ':':<14}{escape_text(text)}")


@profile.command(
    epilog=help_examples(
        "sandbox profile build agentic-dev",
        "sandbox profile build my-tools --from-oci my-tools.tar",
    )
)
@click.argument("name")
@click.option("--from-file", type=_FILE, help="The definition file of a profile that is not included in Sandbox.")
@click.option("--from-oci", type=_FILE, help="An OCI archive to import, as written by 'docker save' or 'skopeo copy'.")
@click.option("--minimum-tier", type=click.Choice(TIERS), help="With --from-oci: the minimum runtime tier.")
@data_dir_options
@output_options("text", "json")
def build(
    *, name: str, from_file: Path | None, from_oci: Path | None, minimum_tier: str | None, **options: Any
) -> None:
    """Build the image of a profile, or import an image.

    A new image does not affect running tasks, which keep the image that they started with. Building requires root and
    mmdebstrap, and uses this machine's apt sources.
    """
    if (from_file and from_oci) or (minimum_tier and not from_oci):
        raise click.UsageError("--from-file cannot be combined with --from-oci; --minimum-tier requires --from-oci.")
    catalog = _catalog(options, makes_directory=True)
    if current_options().format == "text":
        click.echo(f"Building the image of {escape_text(name)}; this takes a minute or more.", err=True)
    with _translate_errors():
        metadata = (
            _import_image(catalog, name, from_oci, minimum_tier) if from_oci else _build_image(catalog, name, from_file)
        )
    if current_options().format == "json":
        print_json(_image_json(metadata))
        return
    click.echo(f"{metadata.profile}@{metadata.digest}")
    summary = f"{pluralize(metadata.entry_count, 'file')}, {format_size(metadata.size_bytes)}"
    click.echo(f"Built the image ({summary}). New tasks with the profile {name} will use it.", err=True)


@profile.command(epilog=help_examples("sandbox profile remove my-tools"))
@click.argument("name")
@data_dir_options
def remove(*, name: str, **options: Any) -> None:
    """Remove the images of a profile. The command fails if a task uses one of the images."""
    catalog = _catalog(options)
    with _translate_errors():
        catalog.image_store(name).remove_images()
        is_still_offered = name in catalog.names()
    consequence = "tasks use the host's /usr again" if is_still_offered else "the profile is no longer offered"
    click.echo(f"Removed the images of {name}; {consequence}.", err=True)


def _catalog(options: Mapping[str, Any], *, makes_directory: bool = False) -> ProfileCatalog:
    from sandbox.bootstrap.private_directories import make_data_dir
    from sandbox.images.profiles import ProfileCatalog

    data_dir = load_configuration(options).settings.server.data_dir.absolute()
    return ProfileCatalog(make_data_dir(data_dir) if makes_directory else data_dir)


def _build_image(catalog: ProfileCatalog, name: str, from_file: Path | None) -> ImageMetadata:
    from sandbox.images.image_builder import build_image
    from sandbox.images.profiles import read_definition, read_shipped, shipped_profiles

    image_store = catalog.image_store(name)
    if from_file is None and name not in shipped_profiles():
        shipped = ", ".join(shipped_profiles())
        fail(
            f"Error: {name} is not included in Sandbox (included: {shipped}); give --from-file or --from-oci.",
            ExitCode.USAGE,
        )
    definition = read_definition(from_file) if from_file else read_shipped(name)
    return build_image(image_store, definition, image_components())


def image_components() -> Mapping[str, Component]:
    """Return the components that images can contain, keyed by the names that profile definitions use."""
    from sandbox.images.image_builder import Component
    from sandbox.runtimes import nodejs, sandbox_filesystem

    try:
        version = nodejs.node_version()
    except (OSError, SubprocessError):
        version = None
    versions = {"node": version} if version else {}
    configuration = sandbox_filesystem.etc_files("")[nodejs.NPM_CONFIGURATION]
    return {
        "node": Component(
            paths=nodejs.find_mounts(),
            links=nodejs.LINKS,
            files={nodejs.NPM_CONFIGURATION: configuration},
            versions={**versions, **nodejs.pinned_packages()},
        )
    }


def _import_image(catalog: ProfileCatalog, name: str, file: Path, minimum_tier: str | None) -> ImageMetadata:
    from sandbox.images.image_builder import import_image

    return import_image(catalog.image_store(name), file, minimum_tier or "")


@contextmanager
def _translate_errors() -> Iterator[None]:
    from sandbox.interfaces import images

    codes = {
        images.ProfileNotFoundError: ExitCode.NOT_FOUND,
        images.ProfileBusyError: ExitCode.CONFLICT,
        images.InvalidProfileError: ExitCode.USAGE,
    }
    try:
        yield
    except tuple(codes) as error:
        fail(f"Error: {escape_text(error.message)}", codes[type(error)])


def _image_json(metadata: ImageMetadata) -> dict[str, Any]:
    from sandbox.model.display_text import format_timestamp

    return {
        "name": f"{metadata.profile}@{metadata.digest}",
        "digest": metadata.digest,
        "created_at": format_timestamp(metadata.created_at),
        "source": metadata.source,
        "size_bytes": metadata.size_bytes,
        "entries": metadata.entry_count,
    }


def _profile_json(entry: ProfileEntry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "description": entry.description,
        "shipped": entry.is_shipped,
        "minimum_tier": entry.minimum_tier or None,
        "image": _image_json(entry.metadata) if entry.metadata else None,
        "problem": entry.problem or None,
    }


def _detail_lines(entry: ProfileEntry) -> Iterator[tuple[str, str]]:
    yield "profile", entry.name
    if entry.description:
        yield "description", entry.description
    if entry.minimum_tier:
        yield "minimum tier", entry.minimum_tier
    if entry.problem:
        yield "problem", entry.problem
    elif entry.metadata is None:
        yield "image", f"none; sandboxes use the host's /usr. Build an image: sandbox profile build {entry.name}"
    else:
        image = _image_json(entry.metadata)
        yield "image", image["name"]
        yield "created", f"{image['created_at']} from {entry.metadata.source}"
        yield "size", f"{format_size(entry.metadata.size_bytes)} in {pluralize(entry.metadata.entry_count, 'file')}"
        yield "versions", f"of {pluralize(len(entry.metadata.package_versions), 'package')}; see --format json"


def _print_table(entries: list[ProfileEntry]) -> None:
    from rich.text import Text

    from sandbox.cli.output.table import print_table

    options = current_options()
    rows = [[Text(escape_text(cell)) for cell in _cells(entry)] for entry in entries]
    console = stdout_console(has_color=options.has_color)
    columns = ("NAME", "IMAGE", "SIZE", "CREATED", "TIER", "DESCRIPTION")
    print_table(console, columns, rows, has_border=options.format == "table", omittable=("DESCRIPTION",))


def _cells(entry: ProfileEntry) -> tuple[str, ...]:
    tier = entry.minimum_tier or "any"
    if entry.metadata is None:
        return entry.name, "unusable" if entry.problem else "host", "-", "-", tier, entry.description
    image = _image_json(entry.metadata)
    digest = entry.metadata.digest[: len("sha256:") + 12]
    return entry.name, digest, format_size(entry.metadata.size_bytes), image["created_at"], tier, entry.description
