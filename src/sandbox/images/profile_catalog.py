"""The profiles of a data directory: those shipped with Sandbox, and those with an image; and which are usable."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sandbox.images.errors import ProfileNotFoundError
from sandbox.images.image_store import ImageMetadata, ImageStore, profiles_root
from sandbox.images.profile_definition import check_profile_name, is_profile_name, read_shipped, shipped_profiles
from sandbox.interfaces.images import IMAGE_LAYOUT_VERSION, Image, ImageUnusableError
from sandbox.model.isolation_tier import is_strong_enough


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


def make_profile_problem_lister(
    list_minimum_tiers: Callable[[], Mapping[str, str]], find_tier: Callable[[], str]
) -> Callable[[], Mapping[str, str]]:
    """Return a function that maps each profile to the reason why it is unusable (empty if it is usable).

    Manifests are checked against its result. list_minimum_tiers: see `ProfileCatalog.list_minimum_tiers`. find_tier:
    returns the tier of the server's runtime.
    """

    def list_profile_problems() -> Mapping[str, str]:
        tier = find_tier()
        return {
            name: ""
            if is_strong_enough(tier, minimum)
            else f"requires a runtime of tier {minimum} or stronger; this server's runtime has tier {tier}"
            for name, minimum in list_minimum_tiers().items()
        }

    return list_profile_problems
