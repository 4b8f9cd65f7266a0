"""The profiles of a data directory: their definition files, from which images are built, and which are usable."""

import re
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import msgspec

from sandbox.images.image_store import ImageMetadata, ImageStore, profiles_root
from sandbox.interfaces.images import (
    IMAGE_LAYOUT_VERSION,
    Image,
    ImageUnusableError,
    InvalidProfileError,
    ProfileNotFoundError,
)
from sandbox.interfaces.runtime import TIERS, is_strong_enough

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


@dataclass(frozen=True, slots=True)
class ProfileEntry:
    """A profile's current state.

    metadata: the metadata of its current image; None if there is no image. problem: why the image cannot be used.
    """

    name: str
    is_shipped: bool
    description: str
    minimum_tier: str
    metadata: ImageMetadata | None
    problem: str = ""


class ProfileCatalog:
    """Implements `interfaces.images.ProfileCatalog`. Each call reads the directory, so it includes new images."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir

    def image_store(self, name: str) -> ImageStore:
        """Return the store of the profile's images. Raises InvalidProfileError."""
        return ImageStore(self._data_dir, check_profile_name(name))

    def names(self) -> list[str]:
        """Return the names of all profiles. Directories with an invalid name are ignored."""
        root = profiles_root(self._data_dir)
        imported = [path.parent.name for path in root.glob("*/current")] if root.is_dir() else []
        return sorted({*shipped_profiles(), *filter(is_profile_name, imported)})

    def remove_stale_builds(self) -> None:
        """Remove leftovers of killed builds. Blocks. Raises OSError."""
        root = profiles_root(self._data_dir)
        for directory in root.iterdir() if root.is_dir() else ():
            ImageStore(self._data_dir, directory.name).remove_stale_build()

    def find(self, name: str) -> ProfileEntry:
        """Return a profile. Raises ProfileNotFoundError."""
        definition = read_shipped(name) if name in shipped_profiles() else None
        tier, description = (definition.minimum_tier, definition.description) if definition else ("", "")
        try:
            metadata = self.image_store(name).read_current() if is_profile_name(name) else None
        except ImageUnusableError as error:
            return ProfileEntry(name, definition is not None, description, tier, None, error.message)
        if definition is None and metadata is None:
            offered = ", ".join(self.names())
            raise ProfileNotFoundError(f"There is no profile {name[:64]}; available profiles: {offered}.")
        tier = metadata.minimum_tier if metadata else tier
        return ProfileEntry(name, definition is not None, description, tier, metadata)

    def entries(self) -> list[ProfileEntry]:
        """Return all profiles, except any that are removed during the call."""
        entries = []
        for name in self.names():
            with suppress(ProfileNotFoundError):
                entries.append(self.find(name))
        return entries

    def list_minimum_tiers(self) -> Mapping[str, str]:
        """Return each profile's minimum tier. Implements `ProfileCatalog.list_minimum_tiers`."""
        return {entry.name: entry.minimum_tier for entry in self.entries()}

    def find_image(self, profile: str, tier: str) -> Image | None:
        """Resolve a profile to its image. Implements `ProfileCatalog.find_image`."""
        try:
            entry = self.find(profile)
        except ProfileNotFoundError as error:
            raise ImageUnusableError(error.message) from error
        if entry.problem:
            raise ImageUnusableError(entry.problem)
        if not is_strong_enough(tier, entry.minimum_tier):
            raise ImageUnusableError(
                f"The profile {profile} requires a runtime of tier {entry.minimum_tier} or stronger; this "
                f"server's runtime has tier {tier}."
            )
        metadata = entry.metadata
        if metadata is None:
            return None
        if metadata.layout_version != IMAGE_LAYOUT_VERSION:
            remedy = f"build it again: sandbox profile build {profile}"
            raise ImageUnusableError(
                f"The image of the profile {profile} was built by a different version of Sandbox; {remedy}"
            )
        return Image(profile, metadata.digest, str(self.image_store(profile).rootfs_path(metadata.digest)))


def make_profile_lister(
    list_minimum_tiers: Callable[[], Mapping[str, str]], find_tier: Callable[[], str]
) -> Callable[[], Mapping[str, str]]:
    """Return a function that maps each profile to the reason why it is unusable (empty if it is usable).

    Manifests are validated against its result. list_minimum_tiers: see `ProfileCatalog.list_minimum_tiers`. find_tier:
    returns the tier of the server's runtime.
    """

    def list_profiles() -> Mapping[str, str]:
        tier = find_tier()
        return {
            name: ""
            if is_strong_enough(tier, minimum)
            else f"requires a runtime of tier {minimum} or stronger; this server's runtime has tier {tier}"
            for name, minimum in list_minimum_tiers().items()
        }

    return list_profiles
