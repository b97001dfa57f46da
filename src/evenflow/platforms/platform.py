"""What one machine is: the facts that the engine's decisions depend on. Owns no decision."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Platform:
    """Facts about one device.

    name: for people. device: as PyTorch spells it (ROCm is "cuda"). arch: "gfx942", "sm_90", "cpu". fp8_dtype: torch's
    name of the native 8-bit float or None. lds_bytes: shared memory per workgroup. memory_bytes: total of the device.
    specs: the section of specs.toml that describes it, or None when it is not listed.
    num_devices: how many of them this process can use. peer_sum_sizes: how many such devices have done our sums over
    peer memory (kernels/all_reduce.py) together, rightly and faster than the library.
    """

    name: str
    device: str
    arch: str
    warp_size: int
    fp8_dtype: str | None
    lds_bytes: int
    supports_graphs: bool
    memory_bytes: int
    default_dtype: str
    specs: str | None = None
    num_devices: int = 1
    peer_sum_sizes: tuple[int, ...] = ()


def detect(device: str = "auto") -> Platform:
    """The platform of `device` ("auto", "cpu" or "cuda"). Raises ValueError when it is not there."""
    from evenflow.platforms import cpu

    if device == "cpu":
        return cpu.detect()
    from evenflow.platforms import gpu

    if device == "auto":
        return gpu.detect() or cpu.detect()
    if device != "cuda":
        raise ValueError(f"device={device!r} must be 'auto', 'cpu' or 'cuda' (AMD GPUs are 'cuda' in PyTorch too)")
    platform = gpu.detect()
    if platform is None:
        raise ValueError("device='cuda', but PyTorch sees no GPU; `evenflow doctor` says why. Use device='cpu'")
    return platform
