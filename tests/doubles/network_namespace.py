"""Sockets in another network namespace. A socket stays in the namespace in which it was created."""

import contextlib
import ctypes
import os

import httpx2

_CLONE_NEWNET = 0x40000000


@contextlib.contextmanager
def in_namespace(path):
    """Move this thread into the namespace during the block."""
    libc = ctypes.CDLL(None, use_errno=True)
    current = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    target = os.open(path, os.O_RDONLY)
    try:
        _enter(libc, target)
        yield
    finally:
        _enter(libc, current)
        os.close(current)
        os.close(target)


def _enter(libc, namespace):
    if libc.setns(namespace, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


class NamespaceTransport(httpx2.HTTPTransport):
    """An HTTP transport whose connections are opened inside a namespace."""

    def __init__(self, path):
        super().__init__()
        self._path = path

    def handle_request(self, request):
        with in_namespace(self._path):
            return super().handle_request(request)
