"""Small Triton kernels that between them use what an inference engine's kernels use. Compiled in a child process."""

import triton
import triton.language as tl


@triton.jit
def vector_add(a, b, out, n, block: tl.constexpr):
    i = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(out + i, tl.load(a + i, mask=i < n) + tl.load(b + i, mask=i < n), mask=i < n)


@triton.jit
def softmax(x, out, columns, stride, block: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, block)
    values = tl.load(x + row * stride + i, mask=i < columns, other=float("-inf")).to(tl.float32)
    weights = tl.exp(values - tl.max(values, 0))
    tl.store(out + row * stride + i, (weights / tl.sum(weights, 0)).to(out.dtype.element_ty), mask=i < columns)


@triton.jit
def matmul(a, b, out, k_total, stride_a, stride_b, stride_out, m: tl.constexpr, n: tl.constexpr, k: tl.constexpr):
    """out = a @ b.T; b is [N, K]."""
    rows, columns, depth = (
        tl.program_id(0) * m + tl.arange(0, m),
        tl.program_id(1) * n + tl.arange(0, n),
        tl.arange(0, k),
    )
    a_at, b_at = a + rows[:, None] * stride_a + depth[None, :], b + depth[:, None] + columns[None, :] * stride_b
    total = tl.zeros([m, n], tl.float32)
    for _ in range(0, k_total, k):
        total = tl.dot(tl.load(a_at), tl.load(b_at), total)
        a_at += k
        b_at += k
    tl.store(out + rows[:, None] * stride_out + columns[None, :], total.to(out.dtype.element_ty))


@triton.jit
def scaled_matmul(a, a_scale, b, b_scale, out, m: tl.constexpr, k: tl.constexpr):
    i, depth, runs = tl.arange(0, m), tl.arange(0, k), tl.arange(0, k // 32)
    x, y = tl.load(a + i[:, None] * k + depth[None, :]), tl.load(b + depth[:, None] * m + i[None, :])
    scale_x = tl.load(a_scale + i[:, None] * (k // 32) + runs[None, :])
    scale_y = tl.load(b_scale + i[:, None] * (k // 32) + runs[None, :])
    tl.store(out + i[:, None] * m + i[None, :], tl.dot_scaled(x, scale_x, "e4m3", y, scale_y, "e4m3"))


@triton.jit
def integer_matmul(a, b, out, n: tl.constexpr):
    i = tl.arange(0, n)
    product = tl.dot(tl.load(a + i[:, None] * n + i[None, :]), tl.load(b + i[:, None] * n + i[None, :]))
    tl.store(out + i[:, None] * n + i[None, :], product)


@triton.jit
def sort(x, out, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out + i, tl.sort(tl.load(x + i)))


@triton.jit
def philox(out, seed, n: tl.constexpr):
    i = tl.program_id(0) * n + tl.arange(0, n)
    tl.store(out + i, tl.randint(seed, i))


@triton.jit
def scatter_add(x, index, out, n: tl.constexpr):
    i = tl.program_id(0) * n + tl.arange(0, n)
    tl.atomic_add(out + tl.load(index + i), tl.load(x + i), sem="relaxed")


@triton.jit
def histogram(x, out, n: tl.constexpr, bins: tl.constexpr):
    tl.store(out + tl.arange(0, bins), tl.histogram(tl.load(x + tl.arange(0, n)), bins))


@triton.jit
def reductions(x, sums, largest, places, running, n: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, n)
    values = tl.load(x + row * n + i)
    tl.store(sums + row, tl.sum(values, 0))
    tl.store(largest + row, tl.max(values, 0))
    tl.store(places + row, tl.argmax(values, 0))
    tl.store(running + row * n + i, tl.cumsum(values, 0))


@triton.jit
def paged_gather(
    cache, table, length, out, stride_block, block_size: tl.constexpr, width: tl.constexpr, n: tl.constexpr
):
    """out[t] = cache[table[t // block_size], t % block_size] for t < length."""
    t, d = tl.program_id(0) * n + tl.arange(0, n), tl.arange(0, width)
    is_there = t < tl.load(length)
    block = tl.load(table + t // block_size, mask=is_there, other=0).to(tl.int64)
    row = cache + block[:, None] * stride_block + (t % block_size)[:, None] * width + d[None, :]
    tl.store(
        out + t[:, None] * width + d[None, :], tl.load(row, mask=is_there[:, None], other=0.0), mask=is_there[:, None]
    )


@triton.jit
def paged_attention(q, k_cache, v_cache, table, length, out, scale, stride_block, stride_token, group: tl.constexpr,
                    width: tl.constexpr, block_size: tl.constexpr, n: tl.constexpr):  # fmt: skip
    """One query token of one sequence, `group` query heads to a KV head (program 0), online softmax."""
    head, g, d, t = tl.program_id(0), tl.arange(0, 16), tl.arange(0, width), tl.arange(0, n)
    query = tl.load(q + (head * group + g)[:, None] * width + d[None, :], mask=(g < group)[:, None], other=0.0)
    best, total = tl.full([16], float("-inf"), tl.float32), tl.zeros([16], tl.float32)
    mixed = tl.zeros([16, width], tl.float32)
    end = tl.load(length)
    for start in range(0, end, n):
        token = start + t
        is_there = token < end
        block = tl.load(table + token // block_size, mask=is_there, other=0).to(tl.int64)
        place = block * stride_block + (token % block_size) * stride_token + head * width
        keys = tl.load(k_cache + place[None, :] + d[:, None], mask=is_there[None, :], other=0.0)
        values = tl.load(v_cache + place[:, None] + d[None, :], mask=is_there[:, None], other=0.0)
        scores = tl.where(is_there[None, :], tl.dot(query, keys) * scale, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        weights, decay = tl.exp(scores - new_best[:, None]), tl.exp(best - new_best)
        total = total * decay + tl.sum(weights, 1)
        mixed = mixed * decay[:, None] + tl.dot(weights.to(values.dtype), values)
        best = new_best
    result = (mixed / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + (head * group + g)[:, None] * width + d[None, :], result, mask=(g < group)[:, None])


@triton.jit
def elementwise(a, b, out, n: tl.constexpr):
    i = tl.arange(0, n)
    x, y = tl.load(a + i), tl.load(b + i)
    tl.store(out + i, tl.math.div_rn(x, y))
    tl.store(out + n + i, tl.sqrt(tl.abs(x)) + tl.floor(y))
    tl.store(out + 2 * n + i, tl.sigmoid(x) * tl.fma(x, y, 1.0))


@triton.jit
def cast(x, out, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@triton.jit
def meet(counter, out, parties):
    """Every program waits until all have come, then says so."""
    tl.atomic_add(counter, 1, sem="release", scope="sys")
    while tl.atomic_add(counter, 0, sem="acquire", scope="sys") < parties:
        pass
    tl.store(out + tl.program_id(0), 1)
