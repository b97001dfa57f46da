"""A rank whose sums go over shared memory: `python peer_ranks.py RANK SIZE ADDRESS DIRECTORY FOLDER FAULT`.

As ranks.py on a device that is late; the kernel is interpreted, and what a GPU's runtime would map are files in FOLDER.
FAULT, of rank 1: "open", it cannot map the others' memory; "wrong", its kernel's weights are. Prints JSON.
"""

import json
import mmap
import sys
from contextlib import suppress
from pathlib import Path

import ranks
import torch

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from interpreter import interpreted

from evenflow import distributed
from evenflow.kernels import self_check
from evenflow.platforms.peer_memory import HANDLE_BYTES, PeerMemoryError
from evenflow.runner import device_runner


class FileMemory:
    """PeerMemory, of files. rank, folder, fault: set below."""

    rank, folder, fault = 0, Path(), ""

    def __init__(self, num_bytes):
        self.maps = []
        (self.folder / str(self.rank)).write_bytes(bytes(num_bytes))
        self.address = self._map(str(self.rank))
        self.handle = str(self.rank).encode().ljust(HANDLE_BYTES, b"\0")

    def open(self, handle):
        if self.fault == "open":
            raise PeerMemoryError("planted")
        return self._map(handle.rstrip(b"\0").decode())

    def _map(self, name):
        with open(self.folder / name, "r+b") as file:
            self.maps.append(mmap.mmap(file.fileno(), 0))
        return torch.frombuffer(self.maps[-1], dtype=torch.uint8).data_ptr()


def main(rank: int, size: int, address: str, directory: str, folder: str, fault: str) -> None:
    torch.set_num_threads(1)
    FileMemory.rank, FileMemory.folder, FileMemory.fault = rank, Path(folder), fault if rank == 1 else ""
    distributed.PeerMemory = FileMemory
    torch.cuda.can_device_access_peer = lambda ours, theirs: True
    accounts, sums = [], []
    connect, launch, check = (
        distributed.connect_peers,
        distributed.launch_reduce_add_rms_norm,
        self_check.launch_reduce_add_rms_norm,
    )
    device_runner.connect_peers = lambda *args: accounts.append(connect(*args)) or accounts[-1]
    distributed.launch_reduce_add_rms_norm = lambda *args: sums.append(1) or launch(*args)
    if FileMemory.fault == "wrong":
        self_check.launch_reduce_add_rms_norm = lambda x, residual, weight, *rest: check(x, residual, -weight, *rest)
    tp = distributed.join(rank, size, address, ranks.CPU, deadline_s=60)
    tokens = []
    with interpreted():
        if fault == "none":
            settings = dict.fromkeys(("enable_overlap", "enable_graphs", "enable_custom_all_reduce"), True)
            tokens = ranks.generate(Path(directory), tp, **settings)
        else:
            device_runner.connect_peers(tp, 32, torch.float32)
            tp.reduce_add_rms_norm(torch.ones(1, 32), torch.zeros(1, 32), torch.ones(32), 1e-5)
    print(json.dumps({"tokens": tokens, "num_sums": len(sums), "account": accounts[0]}))
    with suppress(RuntimeError):
        distributed.leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
