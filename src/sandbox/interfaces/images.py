"""What profiles stand for: images, read-only trees that become a sandbox's /."""

from collections.abc import Mapping
from typing import Protocol

import msgspec

from sandbox.interfaces.layout import SANDBOX_HOME, SANDBOX_WORKSPACE
from sandbox.model.errors import SandboxError

HOST_IMAGE = "host"
"""What the status calls the host's own /usr."""

IMAGE_DIRECTORIES = ("/dev", "/etc", "/home", SANDBOX_HOME, "/proc", "/run", "/sys", "/tmp", "/var", SANDBOX_WORKSPACE)  # noqa: S108
IMAGE_FILES = (
    *("/etc/passwd", "/etc/group", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/etc/nsswitch.conf"),
    "/etc/gitconfig",
)
"""Every image has these as real directories and files, never links, so that a runtime can mount over each of them
though the image is read-only. /etc has no passwords, /var/tmp leads to /tmp."""

IMAGE_LAYOUT = 1
"""Counts changes to the two above; an image of another number has to be built again."""


class Image(msgspec.Struct, frozen=True):
    """One image of a profile. It never changes: another build is another image.

    digest: `sha256:…` of the tree. directory: the host directory that becomes /.
    """

    profile: str
    digest: str
    directory: str

    @property
    def name(self) -> str:
        """What the status calls it."""
        return f"{self.profile}@{self.digest}"


class ImageUnusableError(SandboxError):
    """A profile has an image that cannot be used: it is damaged, gone, of another Sandbox, or asks for more."""

    code = "image_unusable"


class ProfileCatalog(Protocol):
    """The profiles that a server offers."""

    def list_profiles(self) -> Mapping[str, str]:
        """Name to the weakest tier that the profile takes, empty for any. Looked up anew at each call."""
        ...

    def find_image(self, profile: str, tier: str) -> Image | None:
        """What the profile stands for now, in a runtime of this tier; None for the host's own /usr.

        Raises ImageUnusableError.
        """
        ...


class ImageLeases(Protocol):
    """Keeps images from being removed while something uses them."""

    def acquire(self, image: Image) -> None:
        """Until this process ends. Raises AttemptError (provision_failed)."""
        ...
