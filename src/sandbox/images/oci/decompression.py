"""Decompresses layers of images: gzip, and zstd in a separate process."""

import gzip
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from sandbox.images.errors import ImageRefusedError
from sandbox.images.oci.limited_streams import ByteSource

_CHUNK_BYTES = 1024 * 1024
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_PROGRAM = "/usr/bin/zstd"
_MEMORY_LIMIT = "--memory=128MB"
_ADDRESS_SPACE_LIMIT = "--as=536870912"
"""Limits zstd's address space: zstd's own memory limit does not apply to some formats that it reads, such as xz."""

_LIMITER = ("/usr/bin/prlimit", _ADDRESS_SPACE_LIMIT, "--")
_EXIT_SECONDS = 30


@contextmanager
def uncompressed(blob: BinaryIO, scratch: Path) -> Iterator[ByteSource]:
    """Yield a stream of the uncompressed content. `blob`: seekable and at its start. Raises ImageRefusedError."""
    magic = blob.read(4)
    blob.seek(0)
    if magic.startswith(_GZIP):
        with converting_gzip_errors(), gzip.GzipFile(fileobj=blob, mode="rb") as file:
            yield cast("ByteSource", file)
    elif magic == _ZSTD:
        with _uncompressed_zstd(blob, scratch) as source:
            yield source
    else:
        yield blob


@contextmanager
def converting_gzip_errors() -> Iterator[None]:
    """Convert errors of damaged gzip data to ImageRefusedError."""
    try:
        yield
    except (zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise ImageRefusedError(f"A layer of the image is damaged: {error}.") from error


@contextmanager
def _uncompressed_zstd(blob: BinaryIO, scratch: Path) -> Iterator[ByteSource]:
    """Uncompress a layer with the zstd program. Python has no zstd, and hostile data can harm only that process."""
    if not Path(_PROGRAM).exists():
        raise ImageRefusedError("A layer of the image is compressed with zstd; install zstd: apt-get install zstd")
    with tempfile.TemporaryFile(dir=scratch) as copy:
        while chunk := blob.read(_CHUNK_BYTES):
            copy.write(chunk)
        copy.seek(0)
        process = subprocess.Popen(
            [*_LIMITER, _PROGRAM, "-dc", _MEMORY_LIMIT],
            stdin=copy,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
        )
        assert process.stdout is not None
        try:
            yield process.stdout
            code = process.wait(timeout=_EXIT_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise ImageRefusedError("A layer of the image is damaged: zstd did not finish in time.") from error
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
    if code != 0:
        raise ImageRefusedError("A layer of the image is damaged: zstd cannot read it.")
