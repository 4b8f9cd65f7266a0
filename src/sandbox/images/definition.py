"""The declarative file of a profile: what its image is built from."""

import re
import tomllib
from datetime import date
from pathlib import Path

import msgspec

from sandbox.images.errors import InvalidProfileError
from sandbox.model.tier import TIERS

IMAGE_BYTES_MAX = 16 * 1024**3
"""All files of an image together, by each of their names, and all its layers uncompressed; over it it is refused."""

IMAGE_ENTRIES_MAX = 1_000_000
"""Files, directories, links and whiteouts in all layers together, also directories that only the path of another entry
asks for; and names that whiteouts of directories look at."""

IMAGE_LAYERS_MAX = 128
"""Layers of an archive."""

IMAGE_PATH_BYTES_MAX = 3500
"""A path inside, as an archive writes it."""

IMAGE_DEPTH_MAX = 128
"""Directories within each other: a deeper tree could not be measured, nor removed again."""

IMAGE_METADATA_BYTES_MAX = 4 * 1024**2
"""An index, a manifest or a configuration of an archive, and one header of a tar with all that belongs to it."""

IMAGE_LINKS_MAX = 40
"""Links that are followed on the way to one entry, as the kernel does."""

ARCHIVE_MEMBERS_MAX = 10_000
"""Members of an OCI archive."""

DEFINITION_BYTES_MAX = 64 * 1024
"""The declarative file of a profile."""

BUILD_SECONDS = 1800.0
"""For mmdebstrap; past it it is killed."""

SYNC_SECONDS = 300.0
"""For an image to be flushed to disk before it counts."""


SHIPPED_DIRECTORY = Path(__file__).with_name("shipped")

_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?", re.ASCII)
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+", re.ASCII)


class ImageDefinition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What stands in the file.

    date: what times in the image are set back to. packages: of the distribution, beside its essential ones.
    parts: what Sandbox brings itself, by name. files: absolute path to text. minimum_tier: the weakest that will do.
    """

    description: str
    date: date
    packages: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    files: dict[str, str] = {}
    minimum_tier: str = ""


def shipped_profiles() -> tuple[str, ...]:
    """The names of the profiles that come with Sandbox."""
    return tuple(sorted(path.stem for path in SHIPPED_DIRECTORY.glob("*.toml")))


def read_shipped(name: str) -> ImageDefinition:
    """What a profile that comes with Sandbox is built from."""
    return read_definition(SHIPPED_DIRECTORY / f"{name}.toml")


def read_definition(path: Path) -> ImageDefinition:
    """Read one. Raises InvalidProfileError, OSError."""
    with path.open("rb") as file:
        text = file.read(DEFINITION_BYTES_MAX + 1)
    try:
        if len(text) > DEFINITION_BYTES_MAX:
            raise ValueError(f"it is larger than {DEFINITION_BYTES_MAX // 1024} KiB")
        found = msgspec.convert(tomllib.loads(text.decode()), ImageDefinition, strict=True)
        _check_definition(found)
    except ValueError as error:
        raise InvalidProfileError(f"{path} is no profile: {error}.") from error
    return found


def is_profile_name(name: str) -> bool:
    """Whether a profile can be called so."""
    return _NAME.fullmatch(name) is not None and ".." not in name and name != "host"


def check_profile_name(name: str) -> str:
    """The name, if a profile can have it. Raises InvalidProfileError."""
    if not is_profile_name(name):
        raise InvalidProfileError("A profile's name is 1 to 64 of a-z, 0-9, '.', '_' and '-', such as my-tools.")
    return name


def check_tier(tier: str) -> str:
    """The tier, if there is one of this name; empty for none. Raises InvalidProfileError."""
    if tier and tier not in TIERS:
        raise InvalidProfileError(f"The minimum tier is one of {', '.join(TIERS)}.")
    return tier


def _check_definition(definition: ImageDefinition) -> None:
    check_tier(definition.minimum_tier)
    for package in definition.packages:
        if not _PACKAGE.fullmatch(package):
            raise ValueError(f"{package!r} is no name of a package")
    for path in definition.files:
        if not path.startswith("/"):
            raise ValueError(f"{path!r} in files is no absolute path")
