"""Whole Triton kernels, compiled for the three targets and executed, against torch; and kernels broken on purpose.

Tolerances: exact where the arithmetic is, else at most a few units in the last place of the result's type, as measured.
"""

import re

import numpy as np
import pytest
import torch
from compiled import TARGETS, Compiled, compile_in_child

from evenflow.crosscheck.cdna import errors
from evenflow.crosscheck.cdna.run import RunReport, run_kernel

pytest.importorskip("triton")
FP8 = {"gfx90a": torch.float8_e5m2, "gfx942": torch.float8_e4m3fnuz, "gfx950": torch.float8_e4m3fn}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in cast:RuntimeWarning")


@pytest.fixture(scope="module", params=TARGETS)
def arch(request):
    return request.param


@pytest.fixture(scope="module")
def compiled(arch, tmp_path_factory):
    return compile_in_child(arch, tmp_path_factory.mktemp(arch))


@pytest.fixture
def seeded():
    return torch.Generator().manual_seed(0)


def run(kernel: Compiled, arch: str, grid, *args, **options) -> RunReport:
    sizes = {"num_warps": kernel.num_warps, "shared_bytes": kernel.shared_bytes}
    return run_kernel(kernel.assembly, arch, grid, args, **{**sizes, **options})


def error(result, exact):
    """Norm of the error relative to the norm of the exact result."""
    return ((result.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("preload", [True, False])
def test_vector_add_with_a_masked_tail(compiled, arch, seeded, preload):
    a, b = torch.randn(2, 1000, generator=seeded)
    out = torch.full((1000,), float("nan"))
    report = run(compiled["vector_add"], arch, (2, 1, 1), a, b, out, 1000, preload=preload)
    assert torch.equal(out, a + b)
    assert report.num_waves == 8
    assert report.traffic.bytes_stored == 4000
    assert report.traffic.lines >= 3 * 4000 // 128
    assert report.counts["s_endpgm"] == 8
    # Without preloading the waves load the arguments themselves, and jump over the rest of the first 256 bytes.
    assert (report.counts["s_branch"] == 0) == preload
    assert report.traffic.unattributed == 0


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_softmax(compiled, arch, seeded, name):
    dtype = DTYPES[name]
    x = (3 * torch.randn(5, 512, generator=seeded)).to(dtype)
    out = torch.zeros(5, 512, dtype=dtype)
    run(compiled[f"softmax_{name}"], arch, (5, 1, 1), x, out, 500, 512)
    exact = x[:, :500].double().softmax(1)
    assert error(out[:, :500], exact) < (2e-7 if name == "fp32" else 3e-3)
    assert (out[:, 500:] == 0).all()


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp32", "fp8"])
def test_matmul(compiled, arch, seeded, name):
    dtype = FP8[arch] if name == "fp8" else DTYPES[name]
    a, b = (torch.randn(128, 128, generator=seeded).to(dtype) for _ in range(2))
    out = torch.full((128, 128), float("nan"))
    report = run(compiled[f"matmul_{name}"], arch, (2, 2, 1), a, b, out, 128, 128, 128, 128)
    # Triton multiplies float32 on gfx942 as xf32, with ten bits of mantissa.
    tolerance = 4e-4 if (name, arch) == ("fp32", "gfx942") else 2e-7
    assert error(out, a.double() @ b.double().T) < tolerance
    assert any(mnemonic.startswith("v_mfma") for mnemonic in report.counts)


def test_scaled_matmul(compiled, arch, seeded):
    if arch != "gfx950":
        assert "scaled_matmul" not in compiled  # the other targets have no such instruction
        return
    a, b = torch.randn(64, 128, generator=seeded), torch.randn(128, 64, generator=seeded)
    a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    scales = torch.randint(124, 131, (2, 64, 4), dtype=torch.uint8, generator=seeded)
    out = torch.full((64, 64), float("nan"))
    report = run(compiled["scaled_matmul"], arch, (1, 1, 1), a, scales[0], b, scales[1], out)
    factor = torch.pow(2.0, scales.double() - 127).repeat_interleave(32, 2)
    assert error(out, (a.double() * factor[0]) @ (b.double() * factor[1].T)) < 2e-7
    assert any(mnemonic.startswith("v_mfma_scale") for mnemonic in report.counts)


def test_integer_matmul(compiled, arch, seeded):
    a, b = torch.randint(-128, 128, (2, 64, 64), dtype=torch.int8, generator=seeded)
    out = torch.zeros(64, 64, dtype=torch.int32)
    run(compiled["integer_matmul"], arch, (1, 1, 1), a, b, out)
    assert torch.equal(out, a.int() @ b.int())


def test_sort(compiled, arch, seeded):
    x = torch.randn(256, generator=seeded)
    out = torch.empty(256)
    run(compiled["sort"], arch, (1, 1, 1), x, out)
    assert torch.equal(out, x.sort().values)


def test_philox_against_its_definition(compiled, arch):
    out = torch.zeros(512, dtype=torch.int32)
    run(compiled["philox"], arch, (2, 1, 1), out, 1234)
    assert out.numpy().view(np.uint32).tolist() == [philox(1234, offset) for offset in range(512)]


def philox(seed, offset):
    """First word of Philox 4x32, ten rounds, with the counter (offset, 0, 0, 0)."""
    mask, counter, key = 0xFFFFFFFF, [offset, 0, 0, 0], [seed, 0]
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [second >> 32 ^ counter[1] ^ key[0], second & mask, first >> 32 ^ counter[3] ^ key[1], first & mask]
        key = [key[0] + 0x9E3779B9 & mask, key[1] + 0xBB67AE85 & mask]
    return counter[0]


@pytest.mark.parametrize("kind", ["fp32", "i32"])
def test_atomic_add_with_duplicates(compiled, arch, seeded, kind):
    x = torch.randint(-50, 50, (512,), generator=seeded).to(torch.float32 if kind == "fp32" else torch.int32)
    index = torch.randint(0, 40, (512,), dtype=torch.int32, generator=seeded)
    out = torch.zeros(40, dtype=x.dtype)
    run(compiled[f"scatter_add_{kind}"], arch, (2, 1, 1), x, index, out)
    assert torch.equal(out, torch.zeros_like(out).index_add_(0, index, x))


def test_histogram(compiled, arch, seeded):
    x = torch.randint(0, 64, (1024,), dtype=torch.int32, generator=seeded)
    out = torch.zeros(64, dtype=torch.int32)
    run(compiled["histogram"], arch, (1, 1, 1), x, out)
    assert torch.equal(out, torch.bincount(x, minlength=64).int())


def test_reductions(compiled, arch, seeded):
    x = torch.randn(3, 512, generator=seeded)
    sums, largest, places = torch.empty(3), torch.empty(3), torch.empty(3, dtype=torch.int32)
    running = torch.empty(3, 512)
    run(compiled["reductions"], arch, (3, 1, 1), x, sums, largest, places, running)
    assert error(sums, x.double().sum(1)) < 1e-6
    assert torch.equal(largest, x.amax(1))
    assert torch.equal(places.long(), x.argmax(1))
    assert error(running, x.double().cumsum(1)) < 5e-7


def test_elementwise(compiled, arch, seeded):
    a, b = torch.randn(2, 256, generator=seeded) * 100
    out = torch.empty(3, 256)
    run(compiled["elementwise"], arch, (1, 1, 1), a, b, out)
    assert torch.equal(out[0], a / b)  # IEEE division
    assert error(out[1], a.double().abs().sqrt() + b.double().floor()) < 1e-7
    assert error(out[2], a.double().sigmoid() * (a.double() * b.double() + 1)) < 2e-7


def test_casts(compiled, arch, seeded):
    x = torch.randn(1024, generator=seeded) * 10
    narrow, fp8 = torch.zeros(1024, dtype=torch.bfloat16), torch.zeros(1024, dtype=FP8[arch])
    run(compiled["cast_to_bf16"], arch, (1, 1, 1), x, narrow)
    assert torch.equal(narrow, x.bfloat16())
    run(compiled["cast_to_fp8"], arch, (1, 1, 1), x, fp8)
    assert torch.equal(fp8.view(torch.uint8), x.to(FP8[arch]).view(torch.uint8))
    codes, wide = torch.arange(256, dtype=torch.uint8).view(FP8[arch]), torch.zeros(256)
    run(compiled["cast_from_fp8"], arch, (1, 1, 1), codes, wide)
    assert torch.equal(wide.nan_to_num(nan=-1), codes.float().nan_to_num(nan=-1))


def paged(seeded, dtype, num_tokens=50, heads=2, width=64):
    """(cache of 12 blocks of 16 tokens, a table of blocks in no order, the sequence's length)."""
    cache = torch.randn(2, 12, 16, heads, width, generator=seeded).to(dtype)
    table = torch.randperm(12, generator=seeded)[:4].int()
    return cache, table, torch.tensor([num_tokens], dtype=torch.int32)


def test_paged_gather(compiled, arch, seeded):
    cache, table, length = paged(seeded, torch.float16, heads=1)
    out = torch.full((64, 64), -1.0, dtype=torch.float16)
    run(compiled["paged_gather"], arch, (2, 1, 1), cache[0], table, length, out, 16 * 64)
    token = torch.arange(50)
    assert torch.equal(out[:50], cache[0, table[token // 16].long(), token % 16, 0])
    assert (out[50:] == -1).all()


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_paged_attention(compiled, arch, seeded, name):
    dtype = DTYPES[name]
    cache, table, length = paged(seeded, dtype)
    q = torch.randn(8, 64, generator=seeded).to(dtype)
    out = torch.full((8, 64), float("nan"), dtype=dtype)
    kernel = compiled[f"paged_attention_{name}"]
    report = run(kernel, arch, (2, 1, 1), q, cache[0], cache[1], table, length, out, 0.125, 16 * 2 * 64, 2 * 64)
    token = torch.arange(50)
    keys, values = (part[table[token // 16].long(), token % 16].double() for part in cache)
    scores = torch.einsum("hgd,thd->hgt", q.double().view(2, 4, 64), keys) * 0.125
    exact = torch.einsum("hgt,thd->hgd", scores.softmax(-1), values).reshape(8, 64)
    assert error(out, exact) < (5e-4 if name == "fp16" else 4e-3)
    assert report.traffic.unattributed == 0


def test_workgroups_that_wait_for_each_other(compiled, arch):
    counter, out = torch.zeros(1, dtype=torch.int32), torch.zeros(6, dtype=torch.int32)
    run(compiled["meet"], arch, (6, 1, 1), counter, out, 6)
    assert (out == 1).all()
    with pytest.raises(errors.SimulationError, match="does a wave spin"):
        run(compiled["meet"], arch, (6, 1, 1), torch.zeros_like(counter), out, 7, max_steps=20000)


class TestFaults:
    """Each kind of mistake is found, and named."""

    def gather(self, compiled, arch, seeded, change):
        cache, table, length = paged(seeded, torch.float16, heads=1)
        change(table, length)
        out = torch.zeros(96, 64, dtype=torch.float16)
        run(compiled["paged_gather"], arch, (3, 1, 1), cache[0], table, length, out, 16 * 64)

    def test_block_beyond_the_cache(self, compiled, arch, seeded):
        # The two halves of the cache are one storage, so that block 24 is the first that is not there.
        with pytest.raises(errors.SimulationError, match="through a pointer derived from argument 0") as caught:
            self.gather(compiled, arch, seeded, lambda table, length: table.__setitem__(1, 24))
        assert isinstance(caught.value, (errors.OutOfBoundsError, errors.ProvenanceError))

    def test_length_beyond_the_table(self, compiled, arch, seeded):
        with pytest.raises(errors.OutOfBoundsError, match=r"byte 16 of argument 1 \(int32 \[4\]\), which has 16"):
            self.gather(compiled, arch, seeded, lambda table, length: length.fill_(64 + 1))

    def test_a_pointer_that_strays_into_another_argument(self, compiled, arch):
        a, b, out = (torch.zeros(1024) for _ in range(3))
        # 4096 bytes and a guard gap of 1024: element 1280 of a is element 0 of b.
        with pytest.raises(
            errors.ProvenanceError, match=r"derived from argument 0 .* lands in argument 1 .*, at byte 0 of"
        ):
            run(compiled["vector_add"], arch, (3, 1, 1), a, b, out, 1281)

    @pytest.mark.parametrize("name", ["vector_add", "softmax_fp32", "matmul_bf16"])
    def test_missing_waits(self, compiled, arch, seeded, name):
        """Without any of its waits the kernel fails; without one of them, all but those that only repeat another do."""
        kernel = compiled[name]
        lines = kernel.assembly.splitlines()
        waits = [at for at, line in enumerate(lines) if re.match(r"\s+s_waitcnt\b", line)]
        found = 0
        for missing in [waits, *([at] for at in waits)]:
            text = "\n".join(line for at, line in enumerate(lines) if at not in missing)
            broken = Compiled(text, kernel.shared_bytes, kernel.num_warps)
            try:
                self.run_by_name(name, broken, arch, seeded, preload=False)
            except errors.MissingWaitError as mistake:
                assert "may still be under way" in str(mistake)  # noqa: PT017
                found += 1
            else:
                assert missing is not waits
        assert found > len(waits) // 2

    def run_by_name(self, name, kernel, arch, seeded, **options):
        x = torch.randn(4, 1024, generator=seeded)
        if name == "vector_add":
            run(kernel, arch, (2, 1, 1), x[0], x[1], x[2], 1000, **options)
        elif name == "softmax_fp32":
            run(kernel, arch, (2, 1, 1), x, torch.empty(4, 1024), 500, 512, **options)
        else:
            a = torch.randn(128, 128, generator=seeded).bfloat16()
            run(kernel, arch, (2, 2, 1), a, a, torch.empty(128, 128), 128, 128, 128, 128, **options)

    @pytest.mark.parametrize("name", ["softmax_fp32", "matmul_bf16"])
    def test_missing_barriers(self, compiled, arch, seeded, name):
        kernel = compiled[name]
        text = re.sub(r"(?m)^\ts_barrier$", "\ts_nop 0", kernel.assembly)
        assert text != kernel.assembly
        found = (errors.RaceError, errors.UninitializedReadError, errors.MissingWaitError)
        with pytest.raises(found, match="LDS") as caught:
            self.run_by_name(name, Compiled(text, kernel.shared_bytes, kernel.num_warps), arch, seeded)
        # Where loads go straight into LDS their arrival is what is found missing first.
        assert type(caught.value) is not errors.MissingWaitError or "_lds_" in text

    def test_a_register_that_nobody_wrote(self, compiled, arch, seeded):
        kernel = compiled["vector_add"]
        text = re.sub(r"(?m)^\tv_ashrrev_i32_e32 .*$", "\ts_nop 0", kernel.assembly, count=1)
        assert text != kernel.assembly
        with pytest.raises(errors.UninitializedReadError, match=r"reads v\d+, which nothing has written"):
            self.run_by_name("vector_add", Compiled(text, 0, kernel.num_warps), arch, seeded)

    def test_lds_that_nobody_wrote(self, compiled, arch, seeded):
        kernel = compiled["softmax_fp32"]
        text = re.sub(r"(?m)^\tds_write.*$", "\ts_nop 0", kernel.assembly)
        assert text != kernel.assembly
        with pytest.raises(errors.UninitializedReadError, match="LDS byte .* is read"):
            self.run_by_name("softmax_fp32", Compiled(text, kernel.shared_bytes, kernel.num_warps), arch, seeded)

    def test_too_little_lds(self, compiled, arch, seeded):
        kernel = compiled["softmax_fp32"]
        with pytest.raises(errors.OutOfBoundsError, match="LDS access"):
            self.run_by_name("softmax_fp32", Compiled(kernel.assembly, 4, kernel.num_warps), arch, seeded)
        with pytest.raises(errors.SimulationError, match="bytes of LDS"):
            self.run_by_name("softmax_fp32", Compiled(kernel.assembly, 200 << 10, kernel.num_warps), arch, seeded)
