"""What a layer's bytes are under their compression, told by how they begin and not by what they are called."""

import gzip
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from sandbox.profiles.mistakes import ImageRefusedError
from sandbox.profiles.tar_stream import Source

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_PROGRAM = "/usr/bin/zstd"
_MEMORY = "--memory=128MB"
_END_SECONDS = 30
_CHUNK_BYTES = 1024 * 1024


@contextmanager
def uncompressed(blob: BinaryIO, scratch: Path) -> Iterator[Source]:
    """A stream of the plain bytes. `blob` is at its beginning and can seek. Raises ImageRefusedError."""
    beginning = blob.read(4)
    blob.seek(0)
    if beginning.startswith(_GZIP):
        with refusing_gzip(), gzip.GzipFile(fileobj=blob, mode="rb") as file:
            yield cast("Source", file)
    elif beginning == _ZSTD:
        with _zstd(blob, scratch) as source:
            yield source
    else:
        yield blob


@contextmanager
def refusing_gzip() -> Iterator[None]:
    """Damage is the archive's fault."""
    try:
        yield
    except (zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise ImageRefusedError(f"A layer of the image is damaged: {error}.") from error


@contextmanager
def _zstd(blob: BinaryIO, scratch: Path) -> Iterator[Source]:
    """By its program: Python has no zstd of its own, and this way hostile bytes are read in another process."""
    if not Path(_PROGRAM).exists():
        raise ImageRefusedError("A layer of the image is compressed by zstd; install it: apt-get install zstd")
    with tempfile.TemporaryFile(dir=scratch) as copy:
        while chunk := blob.read(_CHUNK_BYTES):
            copy.write(chunk)
        copy.seek(0)
        process = subprocess.Popen(
            [_PROGRAM, "-dc", _MEMORY], stdin=copy, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={}
        )
        assert process.stdout is not None
        try:
            yield process.stdout
            code = process.wait(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise ImageRefusedError("A layer of the image is damaged: zstd did not end with it.") from error
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
    if code != 0:
        raise ImageRefusedError("A layer of the image is damaged: zstd cannot read it.")
