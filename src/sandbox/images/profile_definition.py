"""The definition file of a profile. The profile's image is built from this file."""

import re
import tomllib
from datetime import date
from pathlib import Path

import msgspec

from sandbox.images.errors import InvalidProfileError
from sandbox.model.isolation_tier import TIERS

DEFINITION_BYTES_MAX = 64 * 1024
"""Maximum size of a profile's definition file."""

SHIPPED_DIRECTORY = Path(__file__).with_name("shipped")

_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?", re.ASCII)
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+", re.ASCII)


class ImageDefinition(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"snapshot_date": "date", "components": "parts"}
):
    """Content of the definition file.

    snapshot_date: the latest timestamp in the image; later timestamps are set to it.
    packages: packages of the distribution, in addition to its essential ones.
    components: names of components that Sandbox provides.
    files: contents, keyed by absolute path.
    minimum_tier: the weakest allowed tier; empty if every tier is allowed.
    """

    description: str
    snapshot_date: date
    packages: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    files: dict[str, str] = {}
    minimum_tier: str = ""


def shipped_profiles() -> tuple[str, ...]:
    """Return the names of the profiles shipped with Sandbox."""
    return tuple(sorted(path.stem for path in SHIPPED_DIRECTORY.glob("*.toml")))


def read_shipped(name: str) -> ImageDefinition:
    """Return the definition of a profile shipped with Sandbox."""
    return read_definition(SHIPPED_DIRECTORY / f"{name}.toml")


def read_definition(path: Path) -> ImageDefinition:
    """Read a definition file. Raises InvalidProfileError, OSError."""
    with path.open("rb") as file:
        text = file.read(DEFINITION_BYTES_MAX + 1)
    try:
        if len(text) > DEFINITION_BYTES_MAX:
            raise ValueError(f"it is larger than {DEFINITION_BYTES_MAX // 1024} KiB")
        found = msgspec.convert(tomllib.loads(text.decode()), ImageDefinition, strict=True)
        _check_definition(found)
    except ValueError as error:
        raise InvalidProfileError(f"{path} is not a valid profile: {error}.") from error
    return found


def is_profile_name(name: str) -> bool:
    """Return whether the name is valid for a profile."""
    return _NAME.fullmatch(name) is not None and ".." not in name and name != "host"


def check_profile_name(name: str) -> str:
    """Return the name if it is valid. Raises InvalidProfileError."""
    if not is_profile_name(name):
        raise InvalidProfileError(
            "A profile name must be 1 to 64 characters of a-z, 0-9, '.', '_' and '-', such as my-tools."
        )
    return name


def check_tier(tier: str) -> str:
    """Return the tier if it is known or empty (no minimum). Raises InvalidProfileError."""
    if tier and tier not in TIERS:
        raise InvalidProfileError(f"The minimum tier must be one of {', '.join(TIERS)}.")
    return tier


def _check_definition(definition: ImageDefinition) -> None:
    check_tier(definition.minimum_tier)
    for package in definition.packages:
        if not _PACKAGE.fullmatch(package):
            raise ValueError(f"{package!r} is not a valid package name")
    for path in definition.files:
        if not path.startswith("/"):
            raise ValueError(f"{path!r} in files is not an absolute path")
