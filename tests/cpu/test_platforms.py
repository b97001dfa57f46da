"""Facts of machines that are not here: data sheets, GPUs as PyTorch would describe them, what doctor says of each."""

import dataclasses

import pytest

from evenflow.doctor import Facts, checkup, collect
from evenflow.platforms import cpu, detect
from evenflow.platforms.gpu import DeviceFacts, platform_of
from evenflow.platforms.specs import all_specs, find_specs, match_device


def test_data_sheets_are_whole():
    assert len(all_specs()) >= 14
    for key, specs in all_specs().items():
        assert specs.source, key
        assert 10e9 < specs.memory_bytes < 400e9, key
        assert 100e9 < specs.bandwidth_bytes_per_s < 20e12, key
        assert 50e12 < specs.bf16_flops < 10e15, key
        assert specs.fp8_flops == 0 or 1.9 < specs.fp8_flops / specs.bf16_flops < 2.1, key


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("MI300X", "mi300x"),
        ("a100", "a100-80gb"),
        ("H100 SXM", "h100-sxm"),
        ("rtx4090", "rtx-4090"),
        ("mi-210", "mi210"),
    ],
)
def test_names(name, key):
    assert find_specs(name).key == key


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match="GPU 'mi300' is not listed; did you mean mi300[ax]?"):
        find_specs("mi300")


@pytest.mark.parametrize(
    ("device", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", "l40"),
        ("AMD Instinct MI300X", "mi300x"),
        ("AMD Instinct MI250X / MI250", "mi250x"),
        ("AMD Radeon RX 7900 XTX", "rx-7900-xtx"),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_devices_find_their_data_sheet(device, key):
    specs = match_device(device)
    assert (specs.key if specs else None) == key


@pytest.mark.parametrize(
    ("facts", "arch", "fp8", "lds_kib"),
    [
        (DeviceFacts("AMD Instinct MI300X", 1, 64, (9, 4), "gfx942:sramecc+:xnack-"), "gfx942", "float8_e4m3fnuz", 64),
        (DeviceFacts("AMD Instinct MI210", 1, 64, (9, 0), "gfx90a:sramecc+"), "gfx90a", None, 64),
        (DeviceFacts("AMD Instinct MI355X", 1, 64, (9, 5), "gfx950"), "gfx950", "float8_e4m3fn", 160),
        (DeviceFacts("AMD Radeon RX 7900 XTX", 1, 32, (11, 0), "gfx1100"), "gfx1100", None, 64),
        (DeviceFacts("NVIDIA A100-SXM4-80GB", 1, 32, (8, 0), None), "sm_80", None, 163),
        (DeviceFacts("NVIDIA L40S", 1, 32, (8, 9), None), "sm_89", "float8_e4m3fn", 99),
        (DeviceFacts("NVIDIA H200", 1, 32, (9, 0), None), "sm_90", "float8_e4m3fn", 227),
        (DeviceFacts("NVIDIA B200", 1, 32, (10, 0), None), "sm_100", "float8_e4m3fn", 227),
    ],
)
def test_gpus(facts, arch, fp8, lds_kib):
    platform = platform_of(facts)
    assert (platform.device, platform.arch, platform.fp8_dtype) == ("cuda", arch, fp8)
    assert platform.lds_bytes == lds_kib * 1024
    assert platform.warp_size == facts.warp_size
    assert platform.specs is not None


def test_detect():
    assert detect("cpu") == cpu.detect()
    assert 0 < cpu.available_memory_bytes() <= cpu.total_memory_bytes()
    with pytest.raises(ValueError, match="device='tpu' must be 'auto', 'cpu' or 'cuda'"):
        detect("tpu")


def test_no_gpu_where_one_is_asked_for(monkeypatch):
    monkeypatch.setattr("evenflow.platforms.gpu.detect", lambda: None)
    assert detect("auto").device == "cpu"
    with pytest.raises(ValueError, match="PyTorch sees no GPU; `evenflow doctor` says why"):
        detect("cuda")


HEALTHY = Facts(torch="2.13.0+cpu", torch_build="cpu", available_memory_bytes=2**34, total_memory_bytes=2**35)
NVIDIA = dataclasses.replace(HEALTHY, has_nvidia=True, torch="2.11.0", torch_build="cuda 13.0", gpus=("NVIDIA H200",))
AMD = dataclasses.replace(HEALTHY, has_amd=True, torch="2.11.0", torch_build="rocm 7.0", gpus=("AMD Instinct MI210",))


@pytest.mark.parametrize(
    ("facts", "what", "fix"),
    [
        (dataclasses.replace(HEALTHY, torch=None), "PyTorch is not installed", "pip install torch"),
        (dataclasses.replace(HEALTHY, torch="2.8.1"), "2.8.1 is outside 2.9 to 2.13", "pip install 'torch>=2.9,<2.14'"),
        (dataclasses.replace(HEALTHY, torch="2.14.0"), "2.14.0 is outside", "pip install"),
        (dataclasses.replace(HEALTHY, torch_error="libcudart is missing"), "libcudart is missing", "force-reinstall"),
        (dataclasses.replace(NVIDIA, torch_build="cpu"), "NVIDIA GPU, but this PyTorch is built for cpu", "whl/cu"),
        (dataclasses.replace(NVIDIA, torch_build="rocm 7.0"), "built for rocm", "whl/cu"),
        (dataclasses.replace(AMD, torch_build="cuda 13.0"), "AMD GPU, but this PyTorch is built for cuda", "whl/rocm"),
        (
            dataclasses.replace(AMD, unreadable_devices=("/dev/kfd",)),
            "no access to /dev/kfd",
            "usermod -a -G render,video",
        ),
        (dataclasses.replace(AMD, gpus_without_peer=((0, 1),)), "GPUs 0 and 1 cannot read", "IOMMU"),
        (dataclasses.replace(HEALTHY, available_memory_bytes=2**29), "only 512 MiB of memory", "--kv-cache-memory"),
        (dataclasses.replace(HEALTHY, missing_demo_files=("config.json",)), "demo model lacks config.json", "pip"),
    ],
)
def test_doctor_finds_what_is_wrong(facts, what, fix):
    problems = checkup(facts)
    assert len(problems) == 1
    assert what in problems[0].what
    assert fix in problems[0].fix


@pytest.mark.parametrize("facts", [HEALTHY, NVIDIA, AMD])
def test_doctor_leaves_healthy_machines_alone(facts):
    assert checkup(facts) == []


def test_doctor_here():
    facts = collect()
    assert facts.torch is not None
    assert facts.num_cores > 0
    assert facts.missing_demo_files == ()
    assert dict(facts.lines())["python"] == facts.python
