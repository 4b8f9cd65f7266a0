"""Creates the home directory on a disk. On a disk from an earlier version of Sandbox, moves the existing one."""

from contextlib import suppress

from sandbox.interfaces.file_layout import AttemptLayout

_NEW_LAYOUT_MARKER = "proc"
"""A directory on new disks, used as a mount point. Disks of earlier versions lack it; their home directory is `home`.

Agents cannot create this directory, because they have no access to the root of a disk.
"""


def create_home(layout: AttemptLayout) -> None:
    """Create the home directory of an open disk. Idempotent, even after an interruption. Raises OSError."""
    marker, parent, new_parent = layout.disk / _NEW_LAYOUT_MARKER, layout.home.parent, layout.disk / "home.new"
    if not marker.exists() and parent.exists():
        with suppress(OSError):
            (layout.disk / "lost+found").rmdir()  # frees blocks and an inode on a full disk
        new_parent.mkdir(exist_ok=True)
        parent.chmod(0o700)  # the owner of a directory needs write permission to move it
        parent.rename(new_parent / layout.home.name)
    marker.mkdir(exist_ok=True)
    # If the parent exists, `home.new` is the mount point of an entry of the image, so it must not be moved.
    if not parent.exists():
        with suppress(FileNotFoundError):
            new_parent.rename(parent)
    parent.mkdir(exist_ok=True)
    parent.chmod(0o755)
    layout.home.mkdir(mode=0o700, exist_ok=True)
