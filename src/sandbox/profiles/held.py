"""What a runner has to do with images: it holds the one that its sandbox stands on."""

from pathlib import Path

from sandbox.contracts.profiles import Image, ImageUnusableError
from sandbox.model.errors import AttemptError, FailureCode


class HeldImages:
    """Implements `contracts.profiles.Images`."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir

    def hold(self, image: Image) -> None:
        """See `Images`. The lock goes with the process."""
        from sandbox.profiles.place import ProfilePlace  # archives and compression, which most runners do without

        try:
            ProfilePlace(self._data_dir, image.profile).hold(image.digest)
        except ImageUnusableError as error:
            raise AttemptError(FailureCode.PROVISION_FAILED, error.message) from error
