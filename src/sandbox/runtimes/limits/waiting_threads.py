"""Interrupts threads that wait in a system call.

A system call keeps a file open until it returns, even if another thread closes the descriptor meanwhile. Such a file is
in no table of descriptors and cannot be counted. An interrupted call returns: most are restarted by the kernel with
the same descriptor, others fail with EINTR, as they do when a process is stopped and continued.
"""

import ctypes
import threading
from collections.abc import Iterable

from sandbox.runtimes.limits.kernel_usage import list_directory

_SEIZE, _INTERRUPT = 0x4206, 0x4207
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def interrupt_threads(process_ids: Iterable[int]) -> None:
    """Interrupt all threads of the processes. Does nothing to those that this process may not trace."""
    # The kernel stops tracing when the tracing thread ends. No thread is waited for, so none stays stopped.
    tracer = threading.Thread(target=_trace, args=(list(process_ids),), name="interrupt-threads")
    tracer.start()
    tracer.join()


def _trace(process_ids: Iterable[int]) -> None:
    for pid in process_ids:
        for thread in list_directory(f"/proc/{pid}/task"):
            if _libc.ptrace(_SEIZE, int(thread), None, None) == 0:
                _libc.ptrace(_INTERRUPT, int(thread), None, None)
