"""Profiles on this host: the components that their images can contain, and which profiles the host can use."""

from collections.abc import Callable, Mapping
from subprocess import SubprocessError
from typing import TYPE_CHECKING

from sandbox.interfaces.images import ProfileCatalog
from sandbox.model.isolation_tier import is_strong_enough
from sandbox.runtimes import nodejs, rootfs_spec

if TYPE_CHECKING:
    from sandbox.images.image_builder import Component


def image_components() -> Mapping[str, "Component"]:
    """Return the components, keyed by the names that profile definitions use."""
    from sandbox.images.image_builder import Component  # runners build no images

    try:
        version = nodejs.node_version()
    except (OSError, SubprocessError):
        version = None
    versions = {"node": version} if version else {}
    configuration = rootfs_spec.etc_files("")[nodejs.NPM_CONFIGURATION]
    return {
        "node": Component(
            paths=nodejs.find_mounts(),
            links=nodejs.LINKS,
            files={nodejs.NPM_CONFIGURATION: configuration},
            versions={**versions, **nodejs.pinned_packages()},
        )
    }


def make_profile_lister(profiles: ProfileCatalog, find_tier: Callable[[], str]) -> Callable[[], Mapping[str, str]]:
    """Return a function that maps each profile to the reason why it is unusable (empty if it is usable).

    Manifests are checked against its result.
    """

    def list_profiles() -> Mapping[str, str]:
        tier = find_tier()
        return {
            name: ""
            if is_strong_enough(tier, minimum)
            else f"requires a runtime of tier {minimum} or stronger; this server's runtime has tier {tier}"
            for name, minimum in profiles.list_profiles().items()
        }

    return list_profiles
