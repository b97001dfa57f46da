from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from accuracy import assert_accurate
from attention_cases import CASES, FP8_CASES, Case, Inputs, attend, make_inputs
from planted_bug import planted

from evenflow.kernels import attention_plan
from evenflow.kernels import paged_attention as module
from evenflow.kernels.attention_plan import launch_plan_attention, make_plan
from evenflow.kernels.paged_attention import (
    AttentionShape,
    decode_launch,
    expected_prompts,
    launch_paged_attention,
    paged_attention,
    prefill_launch,
)
from evenflow.kernels.tuning import (
    DECODE_TILES,
    DECODE_TILES_8_BIT,
    FLOAT32_TILES,
    PREFILL_TILES,
    PREFILL_TILES_8_BIT,
    Tile,
    decode_tile,
    prefill_tile,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def run(inputs: Inputs, **options: Tile | bool) -> torch.Tensor:
    launch_plan_attention(inputs.rows)
    return launch_paged_attention(*inputs.arguments, **options)


def check(inputs: Inputs, found: torch.Tensor) -> None:
    """found may have padding tokens behind. PyTorch's error is the worse one of two ways to add up."""
    exact = attend(inputs, torch.float64)
    eager = [attend(inputs, inputs.q.dtype), paged_attention(*inputs.arguments)[: len(exact)]]
    worst = max(eager, key=lambda out: (out.double() - exact).abs().max().item())
    assert_accurate(found[: len(exact)], worst, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_row(name, dtype):
    inputs = make_inputs(CASES[name], dtype)
    check(inputs, run(inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FP8_CASES)
def test_caches_of_8_bits(name, dtype):
    inputs = make_inputs(FP8_CASES[name], dtype)
    check(inputs, run(inputs))


@pytest.mark.parametrize("name", [*CASES, *FP8_CASES])
def test_the_last_piece_adds_all_of_them_up(name):
    inputs = make_inputs({**CASES, **FP8_CASES}[name], torch.float16)
    check(inputs, run(inputs, merges=True))


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4, 12])
@pytest.mark.parametrize("length", [33, 333, 1111])
def test_the_last_of_any_number_of_pieces(num_kv_heads, length):
    """Of a group of 12, 6, 3 and 1 heads, and of up to 70 pieces: more than are read at a time."""
    case = Case(rows=((1, length), (1, 1), (1, 60)), num_heads=12, num_kv_heads=num_kv_heads, split=(80, 16))
    inputs = make_inputs(case, torch.float16)
    check(inputs, run(inputs, merges=True))
    assert inputs.rows.plan.counts[1] == 2


@pytest.mark.parametrize("cache_dtype", DTYPES, ids=str)
def test_a_cache_of_another_type_is_converted(cache_dtype):
    inputs = make_inputs(Case(rows=((1, 40), (6, 20)), cache_dtype=cache_dtype), torch.float16)
    launch_plan_attention(inputs.rows)
    rounded = replace(inputs, dense=[dense.to(torch.float16) for dense in inputs.dense])
    check(rounded, launch_paged_attention(*inputs.arguments))


def test_a_cache_of_more_than_two_gib():
    """Element offsets overflow 32 bits. Memory that nobody touches costs nothing."""
    case = Case(rows=((1, 100), (9, 30)), cache_dtype=torch.float8_e4m3fn)
    inputs, moved = make_inputs(case, torch.float16), make_inputs(case, torch.float16)
    used, first = inputs.kv_cache, 2**31 // inputs.kv_cache[0].numel()
    cache = torch.empty(first + len(used), *used.shape[1:], dtype=torch.uint8).view(used.dtype)
    cache.view(torch.uint8)[first:] = used.view(torch.uint8)
    moved.rows.block_tables += first
    check(inputs, run(replace(moved, kv_cache=cache)))


TILES = (Tile(16, 1, 1, 16), Tile(16, 4, 2, 128), Tile(64, 4, 3, 32), Tile(128, 8, 2, 64))


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("window", [None, 20])
def test_every_tile_is_right(tile, window):
    case = Case(rows=((1, 130), (33, 70), (1, 16), (17, 17)), window=window, num_heads=6)
    inputs = make_inputs(case, torch.float16)
    check(inputs, run(inputs, decode=tile, prefill=tile))


@pytest.mark.parametrize("target", [1, 2, 5, 40])
@pytest.mark.parametrize("granule", [16, 64])
def test_however_rows_are_cut(target, granule):
    inputs = make_inputs(
        Case(rows=((1, 333), (1, 1), (1, 64), (1, 65), (0, 0)), split=(target, granule)), torch.float16
    )
    check(inputs, run(inputs))


def is_long_first(items: list[list[int]], target: int, granule: int) -> bool:
    """By halves, quarters and eighths of the length that is aimed at."""
    num_keys = sum(end - start for _, _, start, end, *_ in items)
    chunk = max(-(-num_keys // target), 1)
    chunk = -(-chunk // granule) * granule
    longest: dict[int, int] = {}
    for token, _, start, end, *_ in items:
        longest[token] = max(longest.get(token, 0), -(-(end - start) // granule) * granule)
    levels = [sum(longest[token] <= chunk // part for part in (2, 4, 8)) for token, *_ in items]
    return levels == sorted(levels)


@pytest.mark.parametrize("seed", range(30))
def test_the_plan_covers_every_key_once(seed):
    """Pieces of a row follow each other without a gap, partials are numbered without one, and bounds hold."""
    generator = torch.Generator().manual_seed(seed)
    num_rows, target = [int(torch.randint(1, n, (), generator=generator)) for n in (70, 40)]
    longest = (3, 100, 5000)[seed % 3]
    lengths = torch.randint(1, longest, (num_rows,), generator=generator).tolist()
    queries = torch.randint(0, 3, (num_rows,), generator=generator).tolist()
    shapes = [(q, max(n, q) if q else 0) for q, n in zip(queries, lengths, strict=True)]
    plan = make_plan(num_rows + 5, 2, 1, 16, "cpu", target_items=target, granule=16)
    case = Case(rows=tuple(shapes), num_heads=2, num_kv_heads=1, head_dim=16)
    rows = make_inputs(case, torch.float32, plan=plan, seed=seed).rows
    launch_plan_attention(rows)
    num_items, num_splits, num_prompts, num_queries = plan.counts.tolist()
    assert num_items <= num_rows + target
    assert num_splits <= len(plan.splits)
    pieces: dict[int, list[list[int]]] = {}
    of_rows: dict[int, set[tuple[int, int]]] = {}
    items = plan.items[:num_items].tolist()
    assert is_long_first(items, target, granule=16)
    for item in sorted(items, key=lambda item: (item[0], item[2])):
        pieces.setdefault(item[0], []).append(item[1:6])
        of_rows.setdefault(item[0], set()).add(tuple(item[6:8]))
    starts, slots = rows.query_starts.tolist(), rows.slots.tolist()
    expected = {starts[r]: (slots[r], keys) for r, (q, keys) in enumerate(shapes) if q == 1}
    assert pieces.keys() == expected.keys()
    splits = {token: (first, number) for token, first, number, _ in plan.splits[:num_splits].tolist()}
    next_partial = 0
    for token, parts in pieces.items():
        slot, keys = expected[token]
        assert [0, *(end for _, _, end, _, _ in parts)] == [*(start for _, start, *_ in parts), keys]
        assert all(start < end for _, start, end, _, _ in parts)
        assert {(s, n) for s, _, _, n, _ in parts} == {(slot, keys)}
        indices = [partial for *_, partial in parts]
        if len(parts) == 1:
            assert indices == [-1]
            assert token not in splits
        else:
            assert splits[token] == (next_partial, len(parts))
            assert of_rows[token] == {splits[token]}
            assert indices == list(range(next_partial, next_partial + len(parts)))
            next_partial += len(parts)
    assert next_partial <= len(plan.partials)
    prompts = [r for r, (q, _) in enumerate(shapes) if q > 1]
    before = [0, *accumulate(shapes[r][0] for r in prompts)]
    assert (num_prompts, num_queries) == (len(prompts), before[-1])
    expected_prompts = [[n, starts[r], *shapes[r], slots[r]] for n, r in zip(before, prompts, strict=False)]
    assert plan.prompts[:num_prompts, :5].tolist() == expected_prompts


@pytest.mark.parametrize("num_programs", [1, 2, 7])
def test_however_many_programs_share_the_prompts(num_programs):
    plan = make_plan(6, 4, 2, 64, "cpu", target_items=4, num_programs=num_programs)
    case = Case(rows=((40, 60), (1, 30), (2, 2), (0, 0), (129, 200), (16, 16)))
    inputs = make_inputs(case, torch.float16, plan=plan)
    check(inputs, run(inputs, prefill=Tile(32, 4, 2, 32)))


def test_decode_rows_bring_few_idle_programs():
    assert expected_prompts(16064, 66) == 66
    assert expected_prompts(16384, 1024) == 128
    assert expected_prompts(2000, 1004) == 64
    assert expected_prompts(100, 64) == 50


def test_one_case_has_more_prompts_than_are_expected():
    rows = CASES["many prompts"].rows
    assert expected_prompts(sum(queries for queries, _ in rows), len(rows)) < sum(queries > 1 for queries, _ in rows)


@pytest.mark.parametrize("num_programs", [1, 3])
def test_however_many_programs_share_the_split_rows(num_programs):
    plan = make_plan(4, 4, 2, 64, "cpu", target_items=40, granule=16, num_programs=num_programs)
    inputs = make_inputs(Case(rows=((1, 333), (1, 1), (1, 200), (1, 65))), torch.float16, plan=plan)
    check(inputs, run(inputs))
    assert plan.counts[1] == 3


def test_a_plan_of_many_rows():
    plan = make_plan(1100, 2, 1, 16, "cpu", target_items=64, granule=32)
    case = Case(rows=((1, 20),) * 1098 + ((1, 3000), (1, 1)), num_heads=2, num_kv_heads=1, head_dim=16)
    rows = make_inputs(case, torch.float32, plan=plan).rows
    launch_plan_attention(rows)
    num_items, num_splits, *_ = plan.counts.tolist()
    assert num_splits == 1
    chunk = 416  # 24,961 keys for 64 pieces, in whole granules
    assert num_items - 1099 == plan.splits[0, 2] == round(3000 / chunk)


@pytest.mark.parametrize("merges", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_plan_is_used_again(dtype, merges):
    """Nothing of a step is left to the next: fewer rows, then more pieces, in the memory of the same plan."""
    plan = make_plan(8, 4, 2, 64, "cpu", target_items=6, granule=16)
    for seed, rows in enumerate([((1, 300), (1, 20)), ((1, 5),), ((1, 90), (3, 9), (1, 150), (1, 1))]):
        inputs = make_inputs(Case(rows=rows), dtype, seed=seed, plan=plan)
        for _ in range(2):
            check(inputs, run(inputs, merges=merges))


def test_no_token():
    inputs = make_inputs(Case(rows=((0, 0),)), torch.float32)
    assert run(inputs).shape == (0, 4, 64)


def test_inputs_are_left_alone():
    inputs = make_inputs(CASES["mixed"], torch.float16)
    before = inputs.q.clone(), inputs.kv_cache.clone()
    run(inputs)
    assert torch.equal(inputs.q, before[0])
    assert torch.equal(inputs.kv_cache.view(torch.int16), before[1].view(torch.int16))


def test_the_plan_must_fit():
    inputs = make_inputs(CASES["mixed"], torch.float16, plan=make_plan(4, 4, 2, 64, "cpu", target_items=4))
    with pytest.raises(AssertionError, match="fewer rows"):
        launch_plan_attention(inputs.rows)
    inputs = make_inputs(CASES["mixed"], torch.float16, plan=make_plan(5, 4, 2, 128, "cpu", target_items=4))
    with pytest.raises(AssertionError, match="other heads"):
        launch_paged_attention(*inputs.arguments)


@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201", "sm_80", "sm_90", "sm_120", ""])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("query_bytes", [2, 4])
def test_every_architecture_has_tiles(arch, head_dim, query_bytes):
    for group in (1, 3, 8, 71):
        shape = AttentionShape(group * 2, 2, head_dim, query_bytes=query_bytes)
        for launch in (decode_launch(shape, arch), prefill_launch(shape, arch)):
            sizes = [launch.constexprs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_D")]
            assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)
            assert launch.constexprs["BLOCK_M"] >= group
            assert launch.constexprs["BLOCK_D"] >= head_dim


def test_the_longest_prefix_has_the_tile():
    assert prefill_tile("gfx1100", 128, 2, 2) == PREFILL_TILES["gfx11"][128]
    assert prefill_tile("gfx942", 128, 2, 2) == PREFILL_TILES["gfx"][128]
    assert prefill_tile("gfx942", 64, 2, 1) == PREFILL_TILES_8_BIT["gfx"][64]
    assert decode_tile("sm_90", 16, 2, 2) == DECODE_TILES["sm_90"][64]
    assert decode_tile("sm_90", 16, 2, 1) == DECODE_TILES_8_BIT["sm_90"][64]
    assert decode_tile("sm_75", 512, 2, 2) == DECODE_TILES[""][256]
    assert decode_tile("gfx1100", 128, 4, 1) == prefill_tile("gfx1101", 64, 4, 1) == FLOAT32_TILES["gfx11"]


def test_rows_that_are_hardly_longer_than_a_piece_stay_whole():
    plan = make_plan(32, 2, 1, 16, "cpu", target_items=32, granule=16)
    for length, num_splits in ((160, 0), (161, 0), (176, 0), (300, 0)):
        case = Case(rows=((1, length),) * 31 + ((1, 2 * length),), num_heads=2, num_kv_heads=1, head_dim=16)
        launch_plan_attention(make_inputs(case, torch.float32, plan=plan).rows)
        assert plan.counts[:2].tolist() == [33, num_splits + 1]


LONG_ROW, HEAD_SCALES = "decode, one long row", f"scales by head, {torch.float8_e4m3fn}"
PLANTED = {  # what: (case that sees it, code, code with the bug)
    "no mask behind the row's end": ("mixed", "positions[None, :] < last", "positions[None, :] < last + BLOCK_N"),
    "no causal mask": ("prompts", "key[None, :] <= position[:, None]", "key[None, :] < end"),
    "window of decode off by one": ("window", "seq_len - WINDOW)", "seq_len - WINDOW + 1)"),
    "window of a prompt off by one": ("window", "position[:, None] - WINDOW", "position[:, None] - WINDOW + 1"),
    "wrong stride of a block": ("mixed", "block * (2 * H_KV * S * D)", "block * (H_KV * S * D)"),
    "wrong stride in a page": ("heads of 80", "(positions % S) * D", "(positions % S) * BLOCK_D"),
    "values of another head": ("mixed", "cache_ptr + H_KV * S * D", "cache_ptr + (H_KV - 1) * S * D"),
    "no rescale of values": ("mixed", "acc * rescale[:, None], input", "acc, input"),
    "no rescale of the sum": ("mixed", "total * rescale + tl.sum(weights", "total + tl.sum(weights"),
    "no rescale of pieces": (LONG_ROW, "acc = acc * rescale + tl.sum(sums", "acc = acc + tl.sum(sums"),
    "pieces not weighed": (LONG_ROW, "sums * weights[:, None]", "sums"),
    "scale of another head": (HEAD_SCALES, "tl.load(v_scale_ptr + head // G", "tl.load(v_scale_ptr + head % G"),
    "keys not scaled": (HEAD_SCALES, "scale_log2 *= tl.load", "tl.load"),
    "too many tiles without a mask": (
        "prompts of whole tiles",
        "= (first_position + 1) //",
        "= (first_position + BLOCK_Q) //",
    ),
    "queries of another row": ("prompts", "(low - 1) * PROMPT", "tl.maximum(low - 2, 0) * PROMPT"),
    "a block for each program": (
        "many prompts",
        "num_blocks * H_KV, tl.num_programs(0)",
        "tl.num_programs(0), tl.num_programs(0)",
    ),
    "no soft cap": ("soft cap", "if SOFT_CAP > 0:", "if SOFT_CAP > 1000:"),
}


PLANTED_IN_MERGE = {  # of the last piece
    "pieces are not rescaled": (LONG_ROW, "acc * rescale[:, None] + tl.sum(piece_acc", "acc + tl.sum(piece_acc"),
    "pieces are not weighed": (LONG_ROW, "piece_acc * weights[:, :, None]", "piece_acc"),
    "the first piece is left out": (LONG_ROW, "piece = start + sums // BLOCK_G", "piece = start + 1 + sums // BLOCK_G"),
    "the last but one adds up": (LONG_ROW, "kv_head, num_pieces)", "kv_head, num_pieces - 1)"),
    "heads of another group": ("mixed", "piece * (H_KV * G) + kv_head * G", "piece * (H_KV * G)"),
    "values are not scaled": (HEAD_SCALES, "value_scale / total)[:, None]).to(out_ptr.dtype.element_ty)\n    is_real",
                              "1.0 / total)[:, None]).to(out_ptr.dtype.element_ty)\n    is_real"),
}  # fmt: skip


PLANTED_IN_PLAN = {
    "pieces end early": (LONG_ROW, "tl.minimum((piece + 1) * piece_len, ", "tl.minimum((piece + 1) * piece_len - 1, "),
    "rows end early": ("one token", "piece_len, length)", "piece_len, length - 1)"),
    "short prompts not counted": ("prompts", "num_queries > 1", "num_queries > 16"),
}


@pytest.mark.parametrize("what", PLANTED_IN_PLAN)
def test_bugs_planted_in_the_plan_are_seen(what, tmp_path):
    name, code, bug = PLANTED_IN_PLAN[what]
    inputs = make_inputs(CASES[name], torch.float16)
    with planted(attention_plan, code, bug, tmp_path) as copy:
        copy.launch_plan_attention(inputs.rows)
    with pytest.raises(AssertionError):
        check(inputs, launch_paged_attention(*inputs.arguments))


@pytest.mark.parametrize("what", [*PLANTED, *PLANTED_IN_MERGE])
def test_planted_bugs_are_seen(what, tmp_path):
    name, code, bug = {**PLANTED, **PLANTED_IN_MERGE}[what]
    inputs = make_inputs({**CASES, **FP8_CASES}[name], torch.float16)
    inputs.rows.plan.partials.zero_()
    inputs.rows.plan.stats.zero_()
    with planted(module, code, bug, tmp_path) as copy:
        launch_plan_attention(inputs.rows)
        found = copy.launch_paged_attention(*inputs.arguments, merges=what in PLANTED_IN_MERGE)
    with pytest.raises(AssertionError):
        check(inputs, found)


def test_a_count_that_is_left_is_seen(tmp_path):
    inputs = make_inputs(CASES[LONG_ROW], torch.float16)
    counter = "arrived_ptr + first_partial * H_KV + kv_head"
    code, bug = f"arrives_last({counter}, num_pieces)", f"tl.atomic_add({counter}, 1) == num_pieces - 1"
    with planted(module, code, bug, tmp_path) as copy:
        launch_plan_attention(inputs.rows)
        copy.launch_paged_attention(*inputs.arguments, merges=True)
        assert inputs.rows.plan.arrived.any()
        found = copy.launch_paged_attention(*inputs.arguments, merges=True)
    with pytest.raises(AssertionError):
        check(inputs, found)
