"""Images, the read-only root file systems that profiles resolve to, and the errors of profiles and image sources."""

from collections.abc import Callable, Mapping
from typing import Annotated, Protocol

import msgspec

from sandbox.interfaces.runtime import SANDBOX_HOME, SANDBOX_WORKSPACE
from sandbox.model.errors import SandboxError

HOST_IMAGE = "host"
"""The name that stands for the host's own /usr in the status."""

MOUNT_POINT_DIRECTORIES = (
    *("/dev", "/etc", "/home", SANDBOX_HOME, "/proc", "/run", "/sys", "/tmp", "/var", SANDBOX_WORKSPACE),  # noqa: S108
)
MOUNT_POINT_FILES = (
    *("/etc/passwd", "/etc/group", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/etc/nsswitch.conf"),
    "/etc/gitconfig",
)
"""Mount points for the runtimes: directories and files, never links, that every image contains.

They must exist because the image is read-only. An image has no shadow files in /etc, and /var/tmp is a link to /tmp.
"""

IMAGE_LAYOUT_VERSION = 1
"""Version of MOUNT_POINT_DIRECTORIES and MOUNT_POINT_FILES. An image with a different version must be rebuilt."""


ImageDigest = Annotated[str, msgspec.Meta(pattern=r"\Asha256:[0-9a-f]{64}\Z")]
"""SHA-256 of an image's tree. Any other form is rejected when a message is decoded."""


class Image(msgspec.Struct, frozen=True):
    """One image of a profile. Images are immutable; another build creates another image.

    digest: `sha256:…` of the tree.
    directory: the host directory that becomes /.
    """

    profile: str
    digest: ImageDigest
    directory: str

    @property
    def name(self) -> str:
        """The image's name in the status."""
        return f"{self.profile}@{self.digest}"


class ImageUnusableError(SandboxError):
    """The profile's image is missing, damaged or from a different version of Sandbox, or it needs a stronger tier."""

    code = "image_unusable"


class ImageReceptionBusyError(SandboxError):
    """Another process is storing or removing an image of the same profile."""

    code = "image_reception_busy"
    retryable = True


class ImageTransfersBusyError(SandboxError):
    """The server is sending as many images as it can at once."""

    code = "image_transfers_busy"
    retryable = True


class ImageUnreadableError(SandboxError):
    """The server cannot read an image that it should send."""

    code = "image_unreadable"
    retryable = True


class ImageReference(msgspec.Struct, frozen=True):
    """Identifies the image of a profile on every host that has a copy.

    digest: as in `Image`. size_bytes: total size of all regular files. minimum_tier: the weakest allowed tier; empty if
    every tier is allowed.
    """

    profile: str
    digest: ImageDigest
    size_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**62)]
    minimum_tier: str = ""

    @property
    def name(self) -> str:
        """The image's name in the status."""
        return f"{self.profile}@{self.digest}"


class ImageContent(Protocol):
    """The content of an image, in parts. All methods are blocking."""

    def read(self) -> bytes:
        """Return the next part; empty at the end. Raises OSError."""
        ...

    def close(self) -> None:
        """Close the image, so that it may be removed. Idempotent."""
        ...


class ImageCopies(Protocol):
    """The images on a host that receives its images from a server. All methods are blocking."""

    def find(self, image: ImageReference, tier: str) -> Image | None:
        """Return the copy for a runtime of this tier, or None. The copy cannot be removed until this process ends.

        Raises ImageUnusableError if the tier is too weak, OSError.
        """
        ...

    def check_no_own_image(self, profile: str) -> None:
        """Raise ImageUnusableError if this host has an image of the profile that it did not get from a server."""
        ...

    def receive(self, image: ImageReference, read: Callable[[], bytes]) -> None:
        """Store an image.

        read: returns the next part of its content; empty at the end. May raise OSError.

        Raises ImageUnusableError if the content does not have the image's digest or is larger than an image may be,
        ImageReceptionBusyError if another process of this host is receiving an image of the profile, and OSError if
        this host has too little space or cannot store the files as they arrive. After an error, nothing is stored.
        """
        ...


class ProfileCatalog(Protocol):
    """The profiles of a host."""

    def list_minimum_tiers(self) -> Mapping[str, str]:
        """Return each profile's name and minimum tier (empty for any). Reads the current profiles on each call."""
        ...

    def find_image(self, profile: str, tier: str) -> Image | None:
        """Return the profile's current image for a runtime of this tier; None means the host's own /usr.

        Raises ImageUnusableError.
        """
        ...


class ImageSource(ProfileCatalog, Protocol):
    """The profiles of the server, whose images other hosts copy. All methods are blocking."""

    def find_reference(self, profile: str) -> ImageReference | None:
        """Return the current image of a profile; None if the profile has no image. Raises ImageUnusableError."""
        ...

    def open(self, image: ImageReference) -> ImageContent:
        """Open an image, which cannot be removed until it is closed. Raises ImageUnusableError."""
        ...


class ImageLocks(Protocol):
    """Protects images from removal while they are in use."""

    def acquire(self, image: Image) -> None:
        """Protect the image until this process ends. Raises AttemptError (provision_failed)."""
        ...


class ProfileNotFoundError(SandboxError):
    """No profile has this name, or the profile has no image."""

    code = "profile_not_found"


class InvalidProfileError(SandboxError):
    """A profile's name or definition file is invalid."""

    code = "invalid_profile"


class ProfileBusyError(SandboxError):
    """An image of the profile is being built or removed, or is in use by a task."""

    code = "profile_busy"
    retryable = True


class ImageRefusedError(SandboxError):
    """The source of an image is damaged, hostile or too large."""

    code = "image_refused"


class BuildFailedError(SandboxError):
    """The image could not be built on this machine."""

    code = "build_failed"
