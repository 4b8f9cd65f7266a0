"""What can be wrong with profiles and with what images are made from."""

from sandbox.model.errors import SandboxError


class ProfileNotFoundError(SandboxError):
    """No profile has this name, or it has no image."""

    code = "profile_not_found"


class InvalidProfileError(SandboxError):
    """A name or a declarative file that no profile can have."""

    code = "invalid_profile"


class ProfileBusyError(SandboxError):
    """Somebody builds or removes an image of it at this moment, or a task uses it."""

    code = "profile_busy"
    retryable = True


class ImageRefusedError(SandboxError):
    """What an image is to be made from is damaged, hostile or too large."""

    code = "image_refused"


class BuildFailedError(SandboxError):
    """The image could not be built on this machine."""

    code = "build_failed"
