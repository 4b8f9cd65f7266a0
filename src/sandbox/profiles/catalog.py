"""The profiles of a data directory: those that come with Sandbox, and those that have an image there."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sandbox.contracts.profiles import IMAGE_LAYOUT, Image, ImageUnusableError
from sandbox.model.errors import AttemptError, FailureCode
from sandbox.model.tier import is_strong_enough
from sandbox.profiles.declaration import check_name, read_shipped, shipped_profiles
from sandbox.profiles.mistakes import InvalidProfileError, ProfileNotFoundError
from sandbox.profiles.place import ProfilePlace, profiles_root
from sandbox.profiles.record import ImageRecord


@dataclass(frozen=True, slots=True)
class Entry:
    """One profile as it stands. record: of its image, None without one; problem: why the image cannot be used."""

    name: str
    is_shipped: bool
    description: str
    minimum_tier: str
    record: ImageRecord | None
    problem: str = ""


class Catalog:
    """Implements `contracts.profiles.Profiles`. Everything is looked up anew, so a new image is noticed at once."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir

    def place(self, name: str) -> ProfilePlace:
        """Where a profile's images lie. Raises InvalidProfileError."""
        return ProfilePlace(self._data_dir, check_name(name))

    def names(self) -> list[str]:
        """Of all profiles."""
        root = profiles_root(self._data_dir)
        imported = [path.parent.name for path in root.glob("*/current")] if root.is_dir() else []
        return sorted({*shipped_profiles(), *imported})

    def clear(self) -> None:
        """Take away what killed builds left. Blocks. Raises OSError."""
        root = profiles_root(self._data_dir)
        for directory in root.iterdir() if root.is_dir() else ():
            ProfilePlace(self._data_dir, directory.name).clear()

    def find(self, name: str) -> Entry:
        """One profile. Raises ProfileNotFoundError."""
        if name not in self.names():
            offered = ", ".join(self.names())
            raise ProfileNotFoundError(f"There is no profile {name[:64]}; there are: {offered}.")
        declared = read_shipped(name) if name in shipped_profiles() else None
        tier, description = (declared.minimum_tier, declared.description) if declared else ("", "")
        try:
            record = self.place(name).read_current()
        except ImageUnusableError as error:
            return Entry(name, declared is not None, description, tier, None, error.message)
        tier = record.minimum_tier if record else tier
        return Entry(name, declared is not None, description, tier, record)

    def offered(self) -> Mapping[str, str]:
        """See `Profiles`."""
        return {name: self.find(name).minimum_tier for name in self.names()}

    def find_image(self, profile: str, tier: str) -> Image | None:
        """See `Profiles`."""
        try:
            found = self.find(profile)
        except (ProfileNotFoundError, InvalidProfileError) as error:
            raise ImageUnusableError(error.message) from error
        if found.problem:
            raise ImageUnusableError(found.problem)
        if not is_strong_enough(tier, found.minimum_tier):
            raise ImageUnusableError(
                f"The profile {profile} takes a runtime of the tier {found.minimum_tier} or a stronger one; this "
                f"server's is of the tier {tier}."
            )
        record = found.record
        if record is None:
            return None
        if record.layout != IMAGE_LAYOUT:
            mend = f"build it again: sandbox profile build {profile}"
            raise ImageUnusableError(f"The image of the profile {profile} is of another version of Sandbox; {mend}")
        return Image(profile, record.digest, str(self.place(profile).tree(record.digest)))


class HeldImages:
    """Implements `contracts.profiles.Images`."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir

    def hold(self, image: Image) -> None:
        """See `Images`. The lock goes with the process."""
        try:
            ProfilePlace(self._data_dir, image.profile).hold(image.digest)
        except ImageUnusableError as error:
            raise AttemptError(FailureCode.PROVISION_FAILED, error.message) from error
