"""How fast the processor's time stamp counter counts, which QEMU's emulated processor hands on."""

import ctypes
import mmap
import time
from functools import cache

_READ_COUNTER = bytes.fromhex("0f31 48c1e220 4809d0 c3")  # rdtsc; shl rdx, 32; or rax, rdx; ret
_SECONDS = 0.02


@cache
def ticks_per_millisecond() -> int:
    """Measured, because /proc tells how fast the processor is at the moment. Raises OSError."""
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(_READ_COUNTER)
        place = ctypes.c_char.from_buffer(page)
        read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(place))
        began, first = time.perf_counter_ns(), read()
        time.sleep(_SECONDS)
        ended, last = time.perf_counter_ns(), read()
        del place, read
    return int((last - first) * 1_000_000 / (ended - began))
