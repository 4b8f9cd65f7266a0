"""Images, the read-only root file systems that profiles resolve to."""

from collections.abc import Mapping
from typing import Protocol

import msgspec

from sandbox.interfaces.file_layout import SANDBOX_HOME, SANDBOX_WORKSPACE
from sandbox.model.errors import SandboxError

HOST_IMAGE = "host"
"""The name that stands for the host's own /usr in the status."""

IMAGE_DIRECTORIES = ("/dev", "/etc", "/home", SANDBOX_HOME, "/proc", "/run", "/sys", "/tmp", "/var", SANDBOX_WORKSPACE)  # noqa: S108
IMAGE_FILES = (
    *("/etc/passwd", "/etc/group", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/etc/nsswitch.conf"),
    "/etc/gitconfig",
)
"""Mount points for the runtimes: directories and files, never links, that every image contains.

They must exist because the image is read-only. An image has no shadow files in /etc, and /var/tmp is a link to /tmp.
"""

IMAGE_LAYOUT_VERSION = 1
"""Version of IMAGE_DIRECTORIES and IMAGE_FILES. An image with a different version must be rebuilt."""


class Image(msgspec.Struct, frozen=True):
    """One image of a profile. Images are immutable; another build creates another image.

    digest: `sha256:…` of the tree.
    directory: the host directory that becomes /.
    """

    profile: str
    digest: str
    directory: str

    @property
    def name(self) -> str:
        """The image's name in the status."""
        return f"{self.profile}@{self.digest}"


class ImageUnusableError(SandboxError):
    """The profile's image is missing, damaged or from a different version of Sandbox, or it needs a stronger tier."""

    code = "image_unusable"


class ProfileCatalog(Protocol):
    """The profiles of a host."""

    def list_profiles(self) -> Mapping[str, str]:
        """Return each profile's name and minimum tier (empty for any). Reads the current profiles on each call."""
        ...

    def find_image(self, profile: str, tier: str) -> Image | None:
        """Return the profile's current image for a runtime of this tier; None means the host's own /usr.

        Raises ImageUnusableError.
        """
        ...


class ImageLocks(Protocol):
    """Protects images from removal while they are in use."""

    def acquire(self, image: Image) -> None:
        """Protect the image until this process ends. Raises AttemptError (provision_failed)."""
        ...
