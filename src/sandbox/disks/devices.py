"""Loop devices, and the files that they stand for."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

_DELETED = " (deleted)"


def find_devices(image: Path) -> Sequence[Path]:
    """Those in /sys/block that stand for this file, by whatever path it was opened."""
    path = str(image.parent.resolve() / image.name)
    return [device for device, file in list_devices() if file == path or _is_same(file, image)]


def list_devices() -> Iterator[tuple[Path, str]]:
    """Each device that is in use, and its file as the kernel names it."""
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):
            yield backing.parents[1], backing.read_text().rstrip("\n").removesuffix(_DELETED)


def _is_same(file: str, image: Path) -> bool:
    try:
        return Path(file).samefile(image)
    except OSError:
        return False
