"""The tests of each kernel see what they are for: with a bug planted in its source, they fail.

No bug writes outside the tensors. Those of paged attention are in test_paged_attention.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import test_draw
import test_filter
import test_linear
import test_logprobs
import test_many_row_linear
import test_masks
import test_penalties
import test_rms_norm
import test_rotary
import test_sampling_table
import test_silu_and_mul
import test_step_inputs
import torch
from planted_bug import planted

from evenflow.kernels import (
    draw,
    filter,
    linear,
    logprobs,
    many_row_linear,
    masks,
    penalties,
    rms_norm,
    rotary,
    sampling_table,
    silu_and_mul,
    step_inputs,
)

F32, F16 = torch.float32, torch.float16


@dataclass(frozen=True)
class Bug:
    """In `module`, `code` becomes `bug`; then the test `sees` of `tests`, given the planted module, fails."""

    module: ModuleType
    code: str
    bug: str
    tests: ModuleType
    sees: Callable[[Any], object]


BUGS: dict[str, Bug] = {}
SEEN_RIGHT: set[Callable[[Any], object]] = set()  # without a bug they pass; each is tried once


def plant(module: ModuleType, tests: ModuleType, sees: Callable[[Any], object], **bugs: tuple[str, str]) -> None:
    for what, (code, bug) in bugs.items():
        BUGS[f"{module.__name__.rpartition('.')[2]}: {what.replace('_', ' ')}"] = Bug(module, code, bug, tests, sees)


def with_monkeypatch(test: Callable[..., object], *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        test(monkeypatch, *arguments)


plant(
    rms_norm, test_rms_norm, lambda _: test_rms_norm.test_rows_of_any_length((3, 200), F32),
    mean_over_the_padded_row=("axis=1) / D", "axis=1) / x.shape[1]"),
    no_epsilon=("tl.rsqrt(mean + eps)", "tl.rsqrt(mean + 0.01)"),
    rows_in_one_place=("rows.to(tl.int64)[:, None] * D", "(rows * 0).to(tl.int64)[:, None] * D"),
)  # fmt: skip
plant(
    rms_norm, test_rms_norm, lambda _: test_rms_norm.test_size_of_the_values(200.0, F16),
    squares_in_16_bits=("tl.sum(x32 * x32, axis=1)", "tl.sum((x * x).to(tl.float32), axis=1)"),
)  # fmt: skip
plant(
    rms_norm, test_rms_norm, lambda _: test_rms_norm.test_heads_in_the_middle_of_a_joint_projection(7, 3, 80, F32),
    stride_of_a_head=("heads * head_stride", "heads * D"),
)  # fmt: skip
plant(
    rms_norm, test_rms_norm, lambda _: test_rms_norm.test_the_residual_is_added_first((3, 200), F16),
    sum_is_not_stored=("sum_ptr + outs, total", "sum_ptr + outs, residual"),
    norm_of_x_alone=("_normed(total,", "_normed(x,"),
)  # fmt: skip
plant(
    silu_and_mul, test_silu_and_mul, lambda _: test_silu_and_mul.test_any_width((3, 1100), F32),
    sigmoid_of_the_other_sign=("tl.exp(-gate32)", "tl.exp(gate32)"),
    gate_and_up_swapped=(".to(gate.dtype) * up", ".to(gate.dtype) * gate"),
    last_column_is_zero=("activated(gate, up), mask", "activated(gate, up) * (cols < D - 1), mask"),
)  # fmt: skip
plant(
    linear, test_linear, lambda _: test_linear.test_rows_of_any_length((3, 8, 1704), F16),
    last_piece_missing=("sums += weight.to(tl.float32) * _piece(x_ptrs, LAST", "sums += 0.0 * _piece(x_ptrs, LAST"),
    first_piece_again=("weight = next_weight", "weight = weight"),
    x_of_the_first_piece=("tl.load(x_ptrs + start)", "tl.load(x_ptrs)"),
    one_column_too_few=("mask=cols < K - start", "mask=cols < K - start - 1"),
    weights_of_the_first_program=("weight_ptr + outs.to(tl.int64)", "weight_ptr + (outs % BLOCK_N).to(tl.int64)"),
    one_token_for_all=("x_ptr + token * K", "x_ptr + token * 0"),
)  # fmt: skip
plant(
    linear, test_linear, lambda _: test_linear.test_few_rows((33, 128, 1216, 4), F16),
    a_split_left_out=("tl.static_range(SPLITS)", "tl.static_range(SPLITS - 1)"),
    one_split_for_all=("tile_ptrs + part * SIZE", "tile_ptrs"),
    last_step_of_a_split_missing=("(split + 1) * num_steps // SPLITS)", "(split + 1) * num_steps // SPLITS - 1)"),
    steps_that_splits_do_not_divide=("(split + 1) * num_steps // SPLITS)", "(split + 1) * (num_steps // SPLITS))"),
    count_is_left=("arrives_last(arrived_ptr + tile, SPLITS)", "tl.atomic_add(arrived_ptr + tile, 1) == SPLITS - 1"),
    added_up_too_early=("arrived_ptr + tile, SPLITS)", "arrived_ptr + tile, SPLITS - 1)"),
    rows_beyond_the_last=("_outputs(total, GATED, out_ptr.dtype.element_ty), mask=is_token", "total.to(tl.float16)"),
    last_row_missing=("(tokens < num_tokens)[None, :]", "(tokens < num_tokens - 1)[None, :]"),
    x_of_the_first_step=("x_ptrs + step * BLOCK_K", "x_ptrs"),
    weights_of_the_first_step=("weight_ptrs + step * BLOCK_K", "weight_ptrs"),
    one_row_for_all=("tokens[None, :] * K", "tokens[None, :] * 0"),
    weights_of_the_first_tile=("outs.to(tl.int64)[:, None] * K", "(outs % BLOCK_N).to(tl.int64)[:, None] * K"),
)  # fmt: skip
plant(
    linear, test_linear, lambda _: test_linear.test_few_rows((3, 192, 320, 1), F16),
    rows_beyond_the_last_unsplit=(
        "_outputs(sums, GATED, out_ptr.dtype.element_ty), mask=is_token", "sums.to(tl.float16)"
    ),
)  # fmt: skip
plant(
    linear, test_linear, lambda _: test_linear.test_few_gated_rows((17, 64, 1024, 4), F16),
    ups_of_another_gate=("rows % HALF + rows // HALF * D", "rows // 2 + rows % 2 * D"),
    gates_and_ups_swapped=("gate, up = tl.split", "up, gate = tl.split"),
    no_activation=("outs = activated(gate, up)", "outs = gate * up"),
)  # fmt: skip
plant(
    linear, test_linear, lambda _: test_linear.test_gated_rows_of_any_length((3, 8, 1704), F16),
    gates_of_the_first_tile=("tile * HALF + rows % HALF", "rows % HALF"),
    gated_outputs_of_the_first_tile=("columns = _columns_of(tl.program_id(0),", "columns = _columns_of(0,"),
)  # fmt: skip
plant(
    linear, test_linear, lambda _: test_linear.test_gates_are_rounded_before_the_activation(),
    gates_are_not_rounded=("    outs = sums.to(DTYPE)\n    if GATED:", "    outs = sums\n    if GATED:"),
)  # fmt: skip
plant(
    linear, test_linear, lambda _: test_linear.test_sums_of_few_rows_are_in_float32(4),
    sums_of_splits_in_16_bits=("split * SIZE, sums,", "split * SIZE, sums.to(tl.float16).to(tl.float32),"),
    sums_of_steps_in_16_bits=("tl.dot(weight, x, sums)", "tl.dot(weight, x, sums).to(tl.float16).to(tl.float32)"),
)  # fmt: skip
plant(
    linear, test_linear, lambda _: test_linear.test_sums_are_in_float32(),
    sums_in_16_bits=("weight = next_weight", "weight, sums = next_weight, sums.to(tl.float16).to(tl.float32)"),
)  # fmt: skip
plant(
    many_row_linear, test_many_row_linear, lambda _: test_many_row_linear.test_any_shape((97, 24, 40), F16),
    last_step_missing=("tl.cdiv(K, BLOCK_K)", "K // BLOCK_K"),
    first_step_again=("[token, step * BLOCK_K]", "[token, 0]"),
    weights_of_the_first_step=("gate, step * BLOCK_K]", "gate, 0]"),
    weights_of_the_first_tile=("[0, gate, step", "[0, 0, step"),
    gates_and_ups_swapped=("activated(gates, ups)", "activated(ups, gates)"),
    ups_of_another_gate=("[BLOCK_M, 2, HALF]), (0, 2, 1)", "[BLOCK_M, HALF, 2]), (0, 1, 2)"),
    a_last_group_as_high_as_the_others=("tl.minimum(num_down - first, GROUP)", "GROUP"),
    each_group_the_first=("// (GROUP * num_across) * GROUP", "// (GROUP * num_across)"),
    last_rows_missing=("tl.cdiv(num_tokens, BLOCK_M), tl", "num_tokens // BLOCK_M, tl"),
    last_outputs_missing=("tl.cdiv(D, HALF)", "D // HALF"),
)  # fmt: skip
plant(
    many_row_linear, test_many_row_linear, lambda _: test_many_row_linear.test_any_order_of_tiles(3, 2),
    one_tile_a_program=("num_down * num_across, tl.num_programs(0)", "tl.num_programs(0), tl.num_programs(0)"),
)  # fmt: skip
plant(
    many_row_linear, test_many_row_linear,
    lambda _: test_many_row_linear.test_gates_are_rounded_before_the_activation(),
    gates_are_not_rounded=("sums.to(x.dtype), [BLOCK_M", "sums, [BLOCK_M"),
)  # fmt: skip
plant(
    many_row_linear, test_many_row_linear, lambda _: test_many_row_linear.test_sums_are_in_float32(),
    sums_of_steps_in_16_bits=("columns.T, sums)", "columns.T, sums).to(tl.float16).to(tl.float32)"),
)  # fmt: skip
plant(
    rotary, test_rotary, lambda _: test_rotary.test_against_float64(8, 2, 80, F32),
    turned_the_other_way=("first32 * cos - second32 * sin", "first32 * cos + second32 * sin"),
    values_are_rotated=("(heads < H + HKV)[:, None]", "(heads < H + 2 * HKV)[:, None]"),
    angles_of_padding=("tl.load(positions_ptr + token) * HALF", "tl.load(positions_ptr + token) * (HALF - 1)"),
    wrong_place_in_the_page=("* S + index % S", "* S + (index + 1) % S"),
    half_a_head_is_not_stored=("tl.store(cache_ptr + HALF, second", "tl.store(cache_ptr + HALF, first"),
)  # fmt: skip
plant(
    rotary, test_rotary, lambda _: test_rotary.test_only_pages_of_the_index_are_written(),
    padding_is_stored=("tl.load(store_index_ptr + token)", "tl.abs(tl.load(store_index_ptr + token))"),
)  # fmt: skip
plant(
    rotary, test_rotary,
    lambda _: test_rotary.test_small_caches(([0.25, 2.0], [0.001, 4.0]), F16, torch.float8_e4m3fn),
    scale_of_another_head=("kv_heads, kv_heads - HKV) * SCALE_STRIDE", "kv_heads, kv_heads - HKV) * 0"),
    clamped_too_early=("tl.clamp(first, -LARGEST, LARGEST,", "tl.clamp(first, -LARGEST / 2, LARGEST / 2,"),
    multiplied_by_the_scale=("tl.div_rn(first, scale[:, None])", "first * scale[:, None]"),
)  # fmt: skip
plant(
    draw, test_draw, lambda _: test_draw.test_the_best_score_of_float64_wins(5003, F32),
    noise_of_another_seed=("seed_high << 32 | seed_low", "seed_high << 31 | seed_low"),
    noise_of_another_position=("tl.load(params_ptr + _NUM_PROMPT_TOKENS)", "1"),
    noise_of_another_tile=("counters = runs * _LANE + lanes", "counters = lanes + runs * 0"),
    words_swapped=("_log_exponential(w2, ", "_log_exponential(w1, "),
    not_divided_by_the_temperature=("x3 = tl.div_rn(x3, temperature)", "x3 = x3"),
    last_token_missing=("mask=first + _LANE < V", "mask=first + _LANE < V - 200"),
    first_tile_only=("mask=tiles < num_tiles, other=-_INF", "mask=tiles < 1, other=-_INF"),
)  # fmt: skip
plant(
    draw, test_draw, lambda _: test_draw.test_greedy_takes_the_lowest_of_equals(),
    highest_of_equals=("is_better = x > best", "is_better = x >= best"),
)  # fmt: skip
plant(
    draw, test_draw, lambda _: test_draw.test_nan_and_infinity_are_told(1.0, torch.nan, 1029),
    nan_is_not_told=("tl.where(x != x, _INF, x)", "tl.where(x != x, -_INF, x)"),
)  # fmt: skip
plant(
    draw, test_draw, lambda _: test_draw.test_tokens_below_the_threshold_are_never_drawn(),
    threshold_is_ignored=("x1 = tl.where(x1 < threshold, -_INF, x1)", "x1 = x1"),
    threshold_itself_is_dropped=(" < threshold, -_INF", " <= threshold, -_INF"),
)  # fmt: skip
plant(
    draw, test_draw, lambda _: test_draw.test_padding_writes_nothing_and_tokens_go_where_the_row_ends(),
    one_place_too_early=("buffer_stride + length, tl", "buffer_stride + length - 1, tl"),
    written_behind_the_row=("mask=length < L", "mask=length <= L"),
    bad_rows_write_minus_one=("tl.maximum(token, 0)", "token"),
)  # fmt: skip
plant(
    filter, test_filter, lambda _: test_filter.test_every_filter(4200, F32),
    one_value_less=("num1 >= k, num2 >= k, num3 >= k", "num1 > k, num2 > k, num3 > k"),
    min_p_is_ignored=("tl.div_rn(largest, temperature) + log_min_p", "tl.div_rn(largest, temperature) - 1e30"),
    less_than_top_p=("top_p * total", "0.95 * top_p * total"),
    largest_values_have_no_mass=("above + tl.sum(mass1, axis=0)", "tl.sum(mass1, axis=0)"),
    gathered_twice_in_one_place=("num += tl.sum(of_lane, axis=0)", "num += tl.sum(of_lane, axis=0) // 2"),
)  # fmt: skip
plant(
    filter, test_filter, lambda _: test_filter.test_bad_rows_end_and_padding_keeps_all(),
    padding_is_filtered=("is_off = (slot < 0) | (temperature == 0.0)", "is_off = temperature == 0.0"),
)  # fmt: skip
plant(
    logprobs, test_logprobs, lambda _: test_logprobs.test_against_float64(5001, F32, 20),
    parts_are_not_rescaled=("tl.sum(total * tl.exp(most - shift), axis=0)", "tl.sum(total, axis=0)"),
    rank_counts_equals=("(x > own)", "(x >= own)"),
    alternatives_of_another_row=("best = row * K + cols - 1", "best = cols - 1"),
    rank_from_zero=("rank = 1 + tl.sum", "rank = tl.sum"),
)  # fmt: skip
plant(
    logprobs, test_logprobs, lambda _: with_monkeypatch(test_logprobs.test_any_number_of_parts, 1),
    no_rescale=("total * tl.exp(largest - shift) + tl.exp(x - shift)", "total + tl.exp(x - shift)"),
    first_block_only=("for start in range(part * part_size, end, BLOCK)", "for start in range(0, BLOCK, BLOCK)"),
)  # fmt: skip
plant(
    logprobs, test_logprobs, lambda _: test_logprobs.test_ties_go_by_id(),
    ties_fall_by_id=("torch.arange(logits.shape[1] - 1, -1, -1,", "torch.arange(0, logits.shape[1], 1,"),
)  # fmt: skip
plant(
    logprobs, test_logprobs, lambda _: test_logprobs.test_banned_tokens_have_the_lowest(),
    infinity_is_told=("tl.where(logprobs < LOWEST, LOWEST, logprobs)", "logprobs"),
)  # fmt: skip
plant(
    masks, test_masks, lambda module: test_masks.test_bits_that_are_not_set_are_banned(
        module.launch_apply_masks_, masks.BLOCK + 33, F32
    ),
    bits_the_other_way=(">> (tokens % 32)) & 1) == 0", ">> (tokens % 32)) & 1) == 1"),
    highest_bit_first=(">> (tokens % 32))", ">> (31 - tokens % 32))"),
    mask_of_another_row=("mask_index * bits_stride", "row * bits_stride"),
    first_block_only=("tl.program_id(0) * BLOCK + tl.arange", "tl.arange"),
)  # fmt: skip
plant(
    penalties, test_penalties, lambda module: test_penalties.test_against_counting(module.launch_apply_penalties_, 37),
    prompt_counts_as_output=("is_prompt = steps < num_prompt_tokens", "is_prompt = steps < 0"),
    repetition_of_one_sign=("tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)", "tl.div_rn(x, repetition)"),
    presence_for_prompts=("tl.where(count > 0, presence, 0.0)", "presence"),
    scratch_is_left=("tl.atomic_and(scratch_ptr + tokens, 0,", "tl.atomic_or(scratch_ptr + tokens, 0,"),
    last_token_missing=("mask=steps < length, other=-1", "mask=steps < length - 1, other=-1"),
)  # fmt: skip
plant(
    step_inputs, test_step_inputs, lambda module: test_step_inputs.test_every_token_is_where_its_row_stands(
        "empty rows first and between", module.launch_expand_rows
    ),
    rows_begin_one_token_late=("query_starts_ptr + middle) <= t", "query_starts_ptr + middle) < t"),
    search_ends_early=(".bit_length()", ".bit_length() - 3"),
    padding_is_stored_somewhere=("block * S + p % S, -1)", "block * S + p % S, 0)"),
    tokens_of_another_slot=("slot * buffer_stride + p", "low * buffer_stride + p"),
)  # fmt: skip
plant(
    step_inputs, test_step_inputs, lambda module: test_step_inputs.test_every_token_is_where_its_row_stands(
        "one token more", module.launch_expand_rows
    ),
    first_program_only=("cdiv(num_tokens, BLOCK),", "1,"),
    written_behind_the_end=("inside = t < T", "inside = t < T + 1"),
)  # fmt: skip
plant(
    step_inputs, test_step_inputs,
    lambda module: test_step_inputs.test_the_last_block_of_the_largest_cache(module.launch_expand_rows),
    places_in_32_bits=("other=0).to(tl.int64)\n    inside", "other=0)\n    inside"),
)  # fmt: skip
plant(
    step_inputs, test_step_inputs,
    lambda module: test_step_inputs.test_words_land_where_they_are_sent(257, module.launch_scatter_words),
    one_word_too_many=("mask = i < count", "mask = i <= count"),
    values_of_the_first_program=("tl.load(value_ptr + i", "tl.load(value_ptr + i % BLOCK"),
)  # fmt: skip
plant(
    sampling_table, test_sampling_table, lambda _: test_sampling_table.test_every_parameter_is_found_again(),
    whole_numbers_as_reals=("row[TOP_K] = top_k", "reals[TOP_K] = top_k"),
    penalties_swapped=("= repetition, presence, frequency", "= repetition, frequency, presence"),
    min_p_itself=("math.log(min_p)", "min_p"),
)  # fmt: skip
plant(
    sampling_table, test_sampling_table, lambda _: test_sampling_table.test_seeds_are_taken_modulo_two_to_the_64(2**63),
    words_of_the_seed_swapped=("words[SEED_LOW], words[SEED_HIGH] = seed", "words[SEED_HIGH], words[SEED_LOW] = seed"),
    half_a_seed=("seed % 2**64 >> 32", "0"),
)  # fmt: skip


@pytest.mark.parametrize("what", BUGS)
def test_the_bug_is_seen(what, tmp_path, monkeypatch):
    bug = BUGS[what]
    if bug.sees not in SEEN_RIGHT:
        bug.sees(bug.module)
        SEEN_RIGHT.add(bug.sees)
    with planted(bug.module, bug.code, bug.bug, tmp_path) as copy:
        for name, value in list(vars(bug.tests).items()):
            if value is bug.module:
                monkeypatch.setattr(bug.tests, name, copy)
            elif getattr(value, "__module__", "") == bug.module.__name__:
                monkeypatch.setattr(bug.tests, name, getattr(copy, name))
        with pytest.raises(AssertionError):
            bug.sees(copy)
