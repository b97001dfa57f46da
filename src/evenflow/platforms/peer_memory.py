"""GPU memory that the other processes of this host can map: handles of the runtime that PyTorch has loaded.

The libraries differ in the prefix of their names only. PyTorch's own way of sharing memory is not used: it leaves files
in shared memory when a process is killed, and hands out parts of larger allocations.
"""

import ctypes
from pathlib import Path
from typing import Any

HANDLE_BYTES = 64
_OPEN_WITH_PEER_ACCESS = 1
_UNCACHED = 3  # hipDeviceMallocUncached: a flag that a peer sets is seen while a kernel runs
_PREFIXES = {"libcudart": "cuda", "libamdhip64": "hip"}


class PeerMemoryError(RuntimeError):
    """The runtime refuses, or there is none."""


class _Handle(ctypes.Structure):
    _fields_ = (("data", ctypes.c_char * HANDLE_BYTES),)


class PeerMemory:
    """`num_bytes` of zeros on the calling thread's current GPU. Raises PeerMemoryError.

    address: in this process; handle: what another process opens.
    """

    def __init__(self, num_bytes: int) -> None:
        self._library, self._prefix = _runtime()
        self._opened: list[int] = []
        pointer = ctypes.c_void_p()
        size = ctypes.c_size_t(num_bytes)
        if self._prefix == "hip":
            self._call("hipExtMallocWithFlags", ctypes.byref(pointer), size, ctypes.c_uint(_UNCACHED))
        else:
            self._call("cudaMalloc", ctypes.byref(pointer), size)
        assert pointer.value is not None
        self.address = pointer.value
        self._call(f"{self._prefix}Memset", pointer, ctypes.c_int(0), size)
        self._call(f"{self._prefix}DeviceSynchronize")
        handle = _Handle()
        self._call(f"{self._prefix}IpcGetMemHandle", ctypes.byref(handle), pointer)
        self.handle = ctypes.string_at(ctypes.addressof(handle), HANDLE_BYTES)

    def open(self, handle: bytes) -> int:
        """The address, on this process's current GPU, of the memory of another process."""
        pointer = ctypes.c_void_p()
        by_value = _Handle.from_buffer_copy(handle)
        flags = ctypes.c_uint(_OPEN_WITH_PEER_ACCESS)
        self._call(f"{self._prefix}IpcOpenMemHandle", ctypes.byref(pointer), by_value, flags)
        assert pointer.value is not None
        self._opened.append(pointer.value)
        return pointer.value

    def close(self) -> None:
        """Give all of it back. No kernel of any process may still use it."""
        while self._opened:
            self._call(f"{self._prefix}IpcCloseMemHandle", ctypes.c_void_p(self._opened.pop()))
        if self.address:
            address, self.address = self.address, 0
            self._call(f"{self._prefix}Free", ctypes.c_void_p(address))

    def _call(self, name: str, *args: Any) -> None:
        function = getattr(self._library, name)
        function.restype = ctypes.c_int
        if code := function(*args):
            describe = getattr(self._library, f"{self._prefix}GetErrorString")
            describe.restype = ctypes.c_char_p
            getattr(self._library, f"{self._prefix}GetLastError")()  # or the next call of PyTorch would report it
            raise PeerMemoryError(f"{name}: {(describe(code) or b'?').decode()}")


def _runtime() -> tuple[ctypes.CDLL, str]:
    """The library that this process has mapped, and its prefix."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        maps = ""
    for line in maps.splitlines():
        path = line.partition("/")[2].removesuffix(" (deleted)")
        for name, prefix in _PREFIXES.items():
            if path.rpartition("/")[2].startswith(f"{name}.so"):
                return ctypes.CDLL(f"/{path}"), prefix
    raise PeerMemoryError("no GPU runtime is loaded")
