"""Which disks this machine can make, found out by trying."""

import os
import tempfile
from pathlib import Path

from sandbox.disks.command import CommandFailedError, run_command
from sandbox.disks.loop import make_file_system

_SIZE_BYTES = 1024 * 1024


async def why_no_loop(directory: Path) -> str | None:
    """None when a small file system can be made and mounted, else the reason; nothing stays in `directory`."""
    if os.geteuid() != 0:
        return "only root can mount"
    with tempfile.TemporaryDirectory(prefix="probe-", dir=directory) as place:
        image, point = Path(place) / "disk.img", Path(place) / "disk"
        point.mkdir()
        try:
            await make_file_system(image, _SIZE_BYTES)
            # In a mount namespace that ends with the command, so that there is nothing to unmount.
            await run_command("unshare", "--mount", "mount", "-t", "ext4", "-o", "loop", str(image), str(point))
        except (CommandFailedError, OSError) as error:
            return str(error)
    return None
