"""The calls of a GPU's runtime for shared memory, against a small library in C that stands in for it."""

import ctypes
import shutil
import subprocess
import sys

import pytest
import torch

from evenflow.platforms import peer_memory

SOURCE = r"""
#include <stdlib.h>
#include <string.h>
typedef struct { char reserved[64]; } handle_t;
int live = 0;
int MALLOC(void **p, size_t n EXTRA) {
    if (n > 1000000) return 2;
    *p = malloc(n); memset(*p, 7, n); live++; return 0;
}
int F(Memset)(void *p, int value, size_t n) { memset(p, value, n); return 0; }
int F(DeviceSynchronize)(void) { return 0; }
int F(IpcGetMemHandle)(handle_t *h, void *p) {
    memset(h, 0, 64); memcpy(h->reserved, &p, sizeof p); h->reserved[63] = 9; return 0;
}
int F(IpcOpenMemHandle)(void **p, handle_t h, unsigned flags) {
    if (flags != 1 || h.reserved[63] != 9) return 1;
    memcpy(p, h.reserved, sizeof *p); live++; return 0;
}
int F(IpcCloseMemHandle)(void *p) { live--; return 0; }
int F(Free)(void *p) { free(p); live--; return 0; }
int F(GetLastError)(void) { return 0; }
const char *F(GetErrorString)(int code) { return code == 2 ? "out of memory" : "invalid"; }
"""
RUNTIMES = {
    "cuda": ("libcudart.so.99", ["-DF(x)=cuda##x", "-DMALLOC=cudaMalloc", "-DEXTRA="]),
    "hip": ("libamdhip64.so.99", ["-DF(x)=hip##x", "-DMALLOC=hipExtMallocWithFlags", "-DEXTRA=, unsigned flags"]),
}
SCRIPT = """
import ctypes, sys
from evenflow.platforms.peer_memory import PeerMemory, PeerMemoryError
library = ctypes.CDLL(sys.argv[1])
memory = PeerMemory(1000)
assert ctypes.string_at(memory.address, 1000) == bytes(1000)
other = PeerMemory(500)
assert memory.open(other.handle) == other.address
assert len(other.handle) == 64
try:
    PeerMemory(2000000)
except PeerMemoryError as error:
    print(error)
try:
    memory.open(bytes(64))
except PeerMemoryError as error:
    print(error)
assert ctypes.c_int.in_dll(library, "live").value == 3
memory.close()
memory.close()
other.close()
assert ctypes.c_int.in_dll(library, "live").value == 0
"""


@pytest.mark.parametrize("prefix", RUNTIMES)
def test_memory_is_made_opened_and_given_back(tmp_path, prefix):
    if shutil.which("gcc") is None or sys.platform != "linux":
        pytest.skip("needs Linux and gcc")
    name, defines = RUNTIMES[prefix]
    (tmp_path / "runtime.c").write_text(SOURCE)
    library = tmp_path / name
    subprocess.run(["gcc", "-shared", "-fPIC", *defines, "-o", library, tmp_path / "runtime.c"], check=True)
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    allocate = "cudaMalloc" if prefix == "cuda" else "hipExtMallocWithFlags"
    assert done.stdout.splitlines() == [f"{allocate}: out of memory", f"{prefix}IpcOpenMemHandle: invalid"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a runtime")
def test_without_a_runtime_it_says_so():
    assert ctypes.sizeof(peer_memory._Handle) == peer_memory.HANDLE_BYTES
    with pytest.raises(peer_memory.PeerMemoryError, match="no GPU runtime is loaded"):
        peer_memory.PeerMemory(16)
