"""Which parts Sandbox brings for images, and which profiles a server of one tier offers."""

from collections.abc import Callable, Mapping
from subprocess import SubprocessError

from sandbox.contracts.profiles import Profiles
from sandbox.model.tier import is_strong_enough
from sandbox.profiles.part import Part
from sandbox.runtimes import image, node


def image_parts() -> Mapping[str, Part]:
    """By the name that a declarative file calls each."""
    try:
        version = node.node_version()
    except (OSError, SubprocessError):
        version = None
    versions = {"node": version} if version else {}
    configuration = image.etc_files("")[node.NPM_CONFIGURATION]
    return {
        "node": Part(
            paths=node.find_parts(),
            links=node.LINKS,
            files={node.NPM_CONFIGURATION: configuration},
            versions={**versions, **node.pinned_packages()},
        )
    }


def tell_offered(profiles: Profiles, find_tier: Callable[[], str]) -> Callable[[], Mapping[str, str]]:
    """Gives the names of all profiles with what is in the way of each, as manifests are held against them."""

    def tell() -> Mapping[str, str]:
        tier = find_tier()
        return {
            name: ""
            if is_strong_enough(tier, minimum)
            else f"takes a runtime of the tier {minimum} or a stronger one; this server's is of the tier {tier}"
            for name, minimum in profiles.offered().items()
        }

    return tell
