"""The tensor-parallel group: who we are in it, how sizes are split, how the ranks meet, and their collectives.

A sum over the ranks always ends in a norm: the output of an embedding, of an attention and of an MLP is each rank's
share of the sum, and `TensorParallel.reduce_add_rms_norm` adds the shares, the residual, and norms, in one step.
Who starts the ranks, sends them work and watches them is in engine/ranks.py.
"""

import contextlib
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store, TCPStore

from evenflow.kernels.all_reduce import (
    BUFFER_BYTES,
    SIZES,
    PeerBuffers,
    best_method,
    launch_reduce_add_rms_norm,
    make_peer_buffers,
)
from evenflow.kernels.rms_norm import add_rms_norm
from evenflow.kernels.self_check import KernelError, check_all_reduce
from evenflow.model_config import ModelConfig
from evenflow.platforms.peer_memory import PeerMemory, PeerMemoryError

COLLECTIVE_TIMEOUT_S = 600.0  # the ranks are watched by who started them; this is for those that nobody watches
_SIOCGIFADDR = 0x8915
_CHECK_S = 0.25
_ending = threading.Lock()  # who aborts the group, or leaves it
# The new name of torch 2.13, whose old one warns.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class PeerLost(RuntimeError):
    """A collective failed: another rank is gone, or did not come in time."""


class RendezvousError(RuntimeError):
    """The ranks did not come together before the deadline."""


class Group:
    """The collectives of this process's group. device: where tensors of the backend live."""

    def __init__(self, device: torch.device, peers: PeerBuffers | None = None) -> None:
        self.device, self.peers = device, peers
        self.num_collectives = 0  # begun by this rank: tells who is behind when a step hangs

    def close(self) -> None:
        """Give back what peers have read. They have ended."""
        if self.peers is not None and isinstance(memory := self.peers.owner, PeerMemory):
            self.peers = None
            with contextlib.suppress(PeerMemoryError):
                memory.close()

    def all_reduce(self, x: Tensor, operation: "dist.ReduceOp.RedOpType" = dist.ReduceOp.SUM) -> Tensor:
        """In place."""
        self.num_collectives += 1
        try:
            dist.all_reduce(x, operation)
        except RuntimeError as error:
            raise PeerLost(f"all_reduce failed: {error}") from error
        return x

    def all_gather(self, x: Tensor, size: int) -> Tensor:
        """[R, n] of every rank -> [R, size * n], in the order of the ranks."""
        self.num_collectives += 1
        gathered = x.new_empty(size, *x.shape)
        try:
            _all_gather(gathered.view(-1), x.contiguous().view(-1))
        except RuntimeError as error:
            raise PeerLost(f"all_gather failed: {error}") from error
        return gathered.movedim(0, -2).reshape(*x.shape[:-1], size * x.shape[-1])


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """Rank `rank` of `size` equal ranks, each of which holds one slice of every sharded weight.

    group: the collectives; None where there is one rank, or where only the slices matter.
    """

    rank: int = 0
    size: int = 1
    group: Group | None = field(default=None, compare=False)

    def split(self, name: str, count: int) -> int:
        """Our share of `count` rows or columns; ValueError when it is not a whole number."""
        if count % self.size:
            raise ValueError(f"{name}={count} cannot be split over tensor_parallel_size={self.size}")
        return count // self.size

    def slice(self, size: int) -> slice:
        """Which of size * self.size rows are ours."""
        return slice(self.rank * size, (self.rank + 1) * size)

    def sharing(self, name: str, count: int) -> "TensorParallel":
        """Over whom `count` key heads are split: over all ranks, or, if they are fewer, over groups of ranks.

        The ranks of a group are neighbours and hold the same head, as their query heads do that attend to it.
        """
        if count >= self.size:
            return self
        if self.size % count:
            raise ValueError(f"{name}={count} can neither be split over nor divide tensor_parallel_size={self.size}")
        ranks_per_head = self.size // count
        return replace(self, rank=self.rank // ranks_per_head, size=count)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks, in place."""
        return x if self.size == 1 else self._group.all_reduce(x)

    def all_gather(self, x: Tensor) -> Tensor:
        """[R, n] of every rank -> [R, size * n], in the order of the ranks."""
        return x if self.size == 1 else self._group.all_gather(x, self.size)

    def minimum(self, value: int) -> int:
        """The smallest of the ranks' values: what all of them can do."""
        if self.size == 1:
            return value
        found = torch.tensor([value], dtype=torch.int64, device=self._group.device)
        return int(self._group.all_reduce(found, dist.ReduceOp.MIN).item())

    def reduce_add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(rms_norm(s), s) with s = residual + the sum of x over the ranks. x, residual: [N, D]; x may be overwritten.

        One kernel over the peers' memory where the message is small and they can read it; else a collective and a norm.
        """
        if self.size == 1:
            return add_rms_norm(x, residual, weight, eps)
        peers = self._group.peers
        if peers is not None and (method := best_method(x, peers)) is not None:
            return launch_reduce_add_rms_norm(x, residual, weight, eps, peers, method)
        return add_rms_norm(self.all_reduce(x), residual, weight, eps)

    @property
    def _group(self) -> Group:
        if self.group is None:
            raise RuntimeError(f"rank {self.rank} of {self.size} has not joined a group")
        return self.group


def local_view(model: ModelConfig, tp: TensorParallel) -> ModelConfig:
    """The model as one rank holds it: its heads and its part of the MLP. The vocabulary stays whole, as logits are.

    Raises ValueError when a size cannot be split.
    """
    kv = tp.sharing("num_key_value_heads", model.num_kv_heads)
    return replace(
        model,
        num_heads=tp.split("num_attention_heads", model.num_heads),
        num_kv_heads=kv.split("num_key_value_heads", model.num_kv_heads),
        intermediate_size=tp.split("intermediate_size", model.intermediate_size),
    )


def listen(address: str) -> tuple[socket.socket, str]:
    """Take tcp://HOST:PORT for rank 0; port 0: any free one. Returns the socket and the address with its port.

    Raises ValueError when the address is none of this host's, or taken.
    """
    host, port = _host_and_port(address)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ValueError(f"cannot listen on {address}: {error.strerror or error}; choose another address") from None
    return listener, f"tcp://{host}:{listener.getsockname()[1]}"


def join(
    rank: int,
    size: int,
    address: str,
    device: torch.device,
    *,
    deadline_s: float,
    listener: socket.socket | None = None,
    collective_timeout_s: float = COLLECTIVE_TIMEOUT_S,
    check: Callable[[], None] = lambda: None,
) -> TensorParallel:
    """Meet the other ranks, all of which call this, and return the group. One group a process.

    address: tcp://HOST:PORT, at which rank 0 listens, and nobody else. listener: rank 0's, if it called `listen`.
    check: called a few times a second while waiting; what it raises ends the wait. Raises ValueError for an address
    that cannot be used, RendezvousError that names the missing ranks at the deadline.
    """
    if dist.is_initialized():
        raise ValueError("this process is in a torch.distributed group already; close the other LLM first")
    host, _ = _host_and_port(address)
    if rank == 0 and listener is None:
        listener, address = listen(address)
    end_s = time.monotonic() + deadline_s
    store = _open_store(rank, size, address, deadline_s, listener)
    _meet(store, rank, size, end_s, deadline_s, check)
    with _environment(host, device):
        try:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=store,
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=collective_timeout_s),
                device_id=torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else None,
            )
        except RuntimeError as error:
            raise RendezvousError(f"rank {rank} of {size} could not connect to the others: {error}") from error
    return TensorParallel(rank, size, Group(device))


def connect_peers(tp: TensorParallel, hidden_size: int, dtype: torch.dtype) -> str:
    """Have small sums of [N, hidden_size] done by our kernel over peer memory, if that works and is right on all ranks.

    All ranks of one host call this; rank r has GPU r. Returns a line about what was found.
    """
    group = tp._group
    reason = "the number of ranks" if tp.size not in SIZES else _map_peers(tp, group)
    if not reason:
        assert group.peers is not None
        try:
            found = check_all_reduce(group.peers, hidden_size, dtype)
            wrong = next((f"{one.kernel} is wrong" for one in found if not one.is_right), "")
        except KernelError as error:
            wrong = str(error)
        reason = _first_reason(tp, wrong)
    if reason:
        group.peers = None
        return f"all-reduce: the library's, not our kernel over peer memory ({reason})"
    return "all-reduce: our kernel over peer memory for small steps"


def _map_peers(tp: TensorParallel, group: Group) -> str:
    """Everybody's buffer in everybody's address space: group.peers. Returns why not, the same on all ranks."""
    others = [rank for rank in range(tp.size) if rank != tp.rank]
    memory, failed = None, ""
    if not all(torch.cuda.can_device_access_peer(tp.rank, other) for other in others):
        failed = "the GPUs cannot read each other's memory"
    try:
        memory = PeerMemory(BUFFER_BYTES) if not failed else None
    except PeerMemoryError as error:
        failed = str(error)
    if (reason := _first_reason(tp, failed)) or memory is None:
        return reason
    handle = torch.frombuffer(bytearray(memory.handle), dtype=torch.uint8).to(group.device)
    handles = group.all_gather(handle[None], tp.size).cpu().view(tp.size, -1)
    addresses = []
    try:
        for rank, theirs in enumerate(handles):
            addresses.append(memory.address if rank == tp.rank else memory.open(theirs.numpy().tobytes()))
    except PeerMemoryError as error:
        failed = str(error)
    if not (reason := _first_reason(tp, failed)):
        group.peers = make_peer_buffers(tp.rank, addresses, group.device, memory)
    return reason


def _first_reason(tp: TensorParallel, failed: str) -> str:
    """Of the ranks that failed; "" if none did. Others say that it was not them."""
    return "" if tp.minimum(int(not failed)) else failed or "another rank could not"


def leave() -> None:
    """Out of the group, if this process is in one. No graph may have recorded a collective of it, see Graphs.clear."""
    with _ending:
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):  # the others may be gone
                dist.destroy_process_group()


def abort(group: Group | None) -> None:
    """Have the collectives that this rank's GPU waits in end, soon, from any thread: the others are gone.

    On a CPU they end by themselves, with the others' connections.
    """
    if group is None or group.device.type != "cuda":
        return
    if group.peers is not None:
        with contextlib.suppress(RuntimeError):  # of a GPU that takes no more work
            group.peers.abort()
    # It tells the GPU at once, and then waits until the graphs are destroyed that collectives were recorded in.
    threading.Thread(target=_abort_library, name="evenflow-abort", daemon=True).start()


def _abort_library() -> None:
    with _ending:
        group = dist.group.WORLD
        if group is not None:
            with contextlib.suppress(RuntimeError):
                group.abort()  # of the only communicator: dist._abort_process_group may hold the interpreter's lock


def _host_and_port(address: str) -> tuple[str, int]:
    parts = urlsplit(address)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme != "tcp" or not parts.hostname or port is None:
        raise ValueError(f"rendezvous address {address!r} must be tcp://HOST:PORT")
    return parts.hostname, port


def _open_store(rank: int, size: int, address: str, deadline_s: float, listener: socket.socket | None) -> Store:
    """Rank 0's key-value store. It gets a socket of ours: the one that it would open listens on every interface."""
    host, port = _host_and_port(address)
    timeout = timedelta(seconds=deadline_s)
    try:
        if listener is not None:
            fd = listener.detach()
            return TCPStore(host, port, size, True, timeout, wait_for_workers=False, master_listen_fd=fd)
        return TCPStore(host, port, size, False, timeout, wait_for_workers=False)
    except RuntimeError as error:
        raise RendezvousError(
            f"rank {rank} of {size} found nobody at {address} within {deadline_s:g} s: {_first_line(error)}"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _meet(store: Store, rank: int, size: int, end_s: float, deadline_s: float, check: Callable[[], None]) -> None:
    """Everybody says that it is there, and waits for everybody."""
    keys = [f"evenflow/joined/{other}" for other in range(size)]
    try:
        store.set(keys[rank], "1")
        while True:
            check()
            missing = [other for other in range(size) if not store.check([keys[other]])]
            if not missing:
                return
            if time.monotonic() > end_s:
                break
            time.sleep(min(_CHECK_S, 0.01 * size))
    except RuntimeError as error:  # the store's own, when rank 0 is gone
        if isinstance(error, dist.DistError):
            raise RendezvousError(f"rank {rank} of {size} lost the rendezvous: {_first_line(error)}") from None
        raise
    names = ", ".join(map(str, missing))
    raise RendezvousError(f"the {size} ranks did not come together within {deadline_s:g} s: missing {names}")


@contextlib.contextmanager
def _environment(host: str, device: torch.device) -> Iterator[None]:
    """What the libraries read from the environment when a group is made; what is there already stays.

    Gloo listens on one interface: here the one on the way to rank 0. Left alone it takes the address of this host's
    name, which may be another network's, or no address at all. PyTorch's own watch over a GPU's collectives ends the
    process, with pages of text, at what engine/ranks.py tells in one line: it is switched off.
    """
    wanted = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
    if device.type == "cpu":
        interface = _interface_towards(host)
        wanted = {"GLOO_SOCKET_IFNAME": interface} if interface is not None else {}
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _interface_towards(host: str) -> str | None:
    """The name of the network interface from which `host` is reached over IPv4; None where that cannot be told."""
    if sys.platform != "linux":
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing
            ours = probe.getsockname()[0]
        except OSError:
            return None
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                reply = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(reply[20:24]) == ours:
                    return name
    return None
