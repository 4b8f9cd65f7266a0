"""Errors of profiles and of image sources."""

from sandbox.model.errors import SandboxError


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
