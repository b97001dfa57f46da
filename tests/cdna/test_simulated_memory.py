"""LDS, global, buffer and scratch instructions, atomics, and what is wrong with an access."""

import numpy as np
import pytest
from snippets import WAVES, execute, fetch, load, machine

from evenflow.crosscheck.cdna.decode import decode
from evenflow.crosscheck.cdna.errors import (
    OutOfBoundsError,
    ProvenanceError,
    RaceError,
    SimulationError,
    UninitializedReadError,
)
from evenflow.crosscheck.cdna.memory import count_lines
from evenflow.crosscheck.cdna.parser import parse

LANE = np.arange(64)
THREAD = LANE + 64 * np.arange(WAVES)[:, None]
RANDOM = np.random.default_rng(0).integers(0, 1 << 32, (4, WAVES, 64), dtype=np.uint64).astype(np.uint32)


@pytest.mark.parametrize(("bits", "words"), [(32, 1), (64, 2), (96, 3), (128, 4)])
def test_lds_round_trip(bits, words):
    data = "v1" if words == 1 else f"v[1:{words}]"
    result = "v9" if words == 1 else f"v[9:{8 + words}]"
    registers = {"v0": THREAD * 16 - 32, **{f"v{1 + word}": RANDOM[word] for word in range(words)}}
    # The negative base of the first lanes becomes a place by its offset, as compilers do it.
    state = execute(
        f"ds_write_b{bits} v0, {data} offset:32\nds_read_b{bits} {result}, v0 offset:32",
        {**registers, "v0": registers["v0"] & 0xFFFFFFFF},
    )
    for word in range(words):
        assert (fetch(state, f"v{9 + word}") == RANDOM[word]).all()
        assert (state.lds.store.words[(THREAD * 4 + word).ravel()] == RANDOM[word].ravel()).all()


def test_lds_pairs_count_offsets_in_elements():
    text = """
        ds_write2_b32 v0, v1, v2 offset0:1 offset1:3
        ds_write2st64_b32 v0, v3, v4 offset0:4 offset1:8
        ds_read2_b32 v[8:9], v0 offset0:3 offset1:1
        ds_read_b32 v10, v0 offset:1024
        ds_read2st64_b32 v[12:13], v0 offset0:4 offset1:8
    """
    registers = {"v0": LANE * 16, **{f"v{1 + word}": RANDOM[word][:1] for word in range(4)}}
    state = execute(text, {**registers, "exec": np.array([0xFFFF], np.uint64)}, machine(waves=1))
    for register, source in {"v8": 1, "v9": 0, "v10": 2, "v12": 2, "v13": 3}.items():
        assert (fetch(state, register)[0, :16] == RANDOM[source][0, :16]).all(), register


def test_lds_wide_pairs():
    text = "ds_write2_b64 v0, v[2:3], v[4:5] offset1:1\nds_read2_b64 v[8:11], v0 offset0:1\nds_read_b128 v[12:15], v0"
    registers = {
        "v0": THREAD * 16,
        "v[2:3]": RANDOM[0].astype(np.uint64),
        "v[4:5]": RANDOM[1].astype(np.uint64) << np.uint64(7),
    }
    state = execute(text, registers)
    assert (fetch(state, "v[8:9]") == fetch(state, "v[4:5]")).all()
    assert (fetch(state, "v[10:11]") == fetch(state, "v[2:3]")).all()
    assert (fetch(state, "v[12:13]") == fetch(state, "v[2:3]")).all()


def test_narrow_lds():
    text = """
        ds_write_b16 v0, v1
        ds_write_b16_d16_hi v0, v1 offset:2
        ds_read_u16 v2, v0
        ds_read_i16 v3, v0 offset:2
        ds_read_u8 v4, v0 offset:1
        ds_read_i8 v5, v0 offset:3
        ds_read_u16_d16 v6, v0 offset:2
        ds_read_u16_d16_hi v7, v0
    """
    state = execute(text, {"v0": THREAD * 4, "v1": 0x89ABCDEF, "v6": 0x11112222, "v7": 0x11112222})
    expected = {"v2": 0xCDEF, "v3": 0xFFFF89AB, "v4": 0xCD, "v5": 0xFFFFFF89, "v6": 0x111189AB, "v7": 0xCDEF2222}
    for register, value in expected.items():
        assert (fetch(state, register) == value).all(), register


@pytest.mark.parametrize(("bits", "dtype"), [(16, np.uint16), (8, np.uint8)])
def test_transposed_reads_give_columns(bits, dtype):
    """Sixteen lanes hold a tile of 64 / bits rows by 16 columns, row after row; lane j gets column j."""
    rows = 64 // bits
    tile = np.arange(4 * rows * 16).reshape(4, rows, 16).astype(dtype)
    state = machine("gfx950", waves=1)
    raw = np.ascontiguousarray(tile).view(np.uint8).ravel()
    state.lds.store.bytes[: raw.size] = raw
    state.lds.is_written.bytes[:] = 1
    execute(f"ds_read_b64_tr_b{bits} v[2:3], v0", {"v0": LANE * 8}, state)
    got = np.ascontiguousarray(np.stack([state.vector[2, 0], state.vector[3, 0]], -1)).view(dtype)
    assert (got == tile.transpose(0, 2, 1).reshape(64, rows)).all()


def test_lds_bounds_and_unwritten_bytes():
    with pytest.raises(OutOfBoundsError, match="ds_read_b64 .*4096 of 4096.*wave 0, lane 7"):
        execute("ds_read_b64 v[2:3], v0", {"v0": np.where(LANE == 7, 4096, 0)}, machine(waves=1))
    with pytest.raises(UninitializedReadError, match="LDS byte 44 is read.*lane 10"):
        execute(
            "ds_write_b32 v0, v1\nds_read_b32 v2, v3",
            {"v0": LANE % 8 * 4, "v1": 1, "v3": np.where(LANE == 10, 44, 0)},
            machine(waves=1),
        )


class TestRaces:
    def test_write_then_read_by_another_wave(self):
        with pytest.raises(RaceError, match="ds_read_b32 v2, v3: .*reads LDS byte 0, which another wave wrote"):
            execute("ds_write_b32 v0, v1\nds_read_b32 v2, v3", {"v0": THREAD * 4, "v1": 1, "v3": 0})

    def test_read_then_write_by_another_wave(self):
        state = machine()
        state.lds.is_written.bytes[:] = 1
        with pytest.raises(RaceError, match="writes LDS byte 256, which another wave read"):
            execute(
                "ds_read_b32 v2, v3\nds_write_b32 v0, v1",
                {"v0": THREAD * 4, "v1": 1, "v3": np.full((WAVES, 64), 256)},
                state,
            )

    def test_different_values(self):
        with pytest.raises(RaceError, match="writes LDS byte 0, which another wave wrote"):
            execute("ds_write_b8 v0, v1", {"v0": LANE, "v1": THREAD})

    def test_the_same_value_is_no_race(self):
        execute("ds_write_b32 v0, v1", {"v0": LANE * 4, "v1": LANE})

    def test_neighbouring_bytes_are_no_race(self):
        execute("ds_write_b8 v0, v1", {"v0": THREAD * 3 % 256, "v1": THREAD * 3 % 256})

    def test_a_barrier_separates(self):
        state = execute("ds_write_b32 v0, v1", {"v0": THREAD * 4, "v1": 1})
        state.lds.races.open_epoch(0)
        execute("ds_read_b32 v2, v3", {"v3": 0}, state)

    def test_atomic_operations_are_no_race_but_reading_them_is(self):
        state = machine()
        state.lds.is_written.bytes[:] = 1
        execute("ds_add_u32 v0, v1", {"v0": 0, "v1": 1}, state)
        with pytest.raises(RaceError, match="reads LDS byte 0"):
            execute("ds_read_b32 v2, v0", {}, state)


def start(*arrays):
    """A machine whose memory holds these arrays, and their addresses."""
    state = machine()
    blocks = [
        state.memory.allocate(np.ascontiguousarray(array).view(np.uint8).ravel(), f"argument {place}", (place,))
        for place, array in enumerate(arrays)
    ]
    return state, [block.address for block in blocks]


def contents(state, place, dtype):
    return state.memory.contents(state.memory.allocations[place]).view(dtype)


def test_global_loads_and_stores():
    data = np.arange(1024, dtype=np.uint32) * 0x01010101
    state, (source, target) = start(data, np.zeros(4096, np.uint32))
    text = """
        global_load_dwordx4 v[4:7], v[0:1], off offset:-16
        global_load_dword v8, v2, s[2:3] offset:8
        global_load_ubyte v9, v[0:1], off offset:1
        global_load_sbyte v10, v[0:1], off
        global_load_sshort v11, v[0:1], off
        global_load_short_d16_hi v12, v[0:1], off
        global_store_dwordx2 v3, v[4:5], s[4:5]
        global_store_byte v3, v8, s[4:5] offset:8
        global_store_short_d16_hi v3, v8, s[4:5] offset:10
    """
    element = (THREAD * 5 + 4) % 1000 + 4
    registers = {"v[0:1]": source + 4 * element.astype(np.uint64), "v2": element * 4, "v3": THREAD * 12, "v12": 0x1111}
    execute(text, {**registers, "s[2:3]": source, "s[4:5]": target}, state)
    for word in range(4):
        assert (fetch(state, f"v{4 + word}") == data[element - 4 + word]).all()
    value = data[element]
    assert (fetch(state, "v8") == data[element + 2]).all()
    assert (fetch(state, "v9") == value >> 8 & 255).all()
    assert (fetch(state, "v10", np.int32) == value.astype(np.uint8).view(np.int8)).all()
    assert (fetch(state, "v11", np.int32) == value.astype(np.uint16).view(np.int16)).all()
    assert (fetch(state, "v12") == (value << 16 | 0x1111)).all()
    stored = contents(state, 1, np.uint32)[: WAVES * 64 * 3].reshape(WAVES, 64, 3)
    assert (stored[..., 0] == data[element - 4]).all()
    assert (stored[..., 1] == data[element - 3]).all()
    narrow = contents(state, 1, np.uint8)[: WAVES * 64 * 12].reshape(WAVES, 64, 12)
    assert (narrow[..., 8] == data[element + 2] & 255).all()
    assert (narrow[..., 9] == 0).all()
    assert (narrow[..., 10] == data[element + 2] >> 16 & 255).all()


def test_traffic():
    state, (source,) = start(np.zeros(4096, np.uint32))
    execute(
        "global_load_dword v4, v2, s[2:3]",
        {"s[2:3]": source, "v2": LANE * 4, "exec": np.array([(1 << 64) - 1, 0xFF, 0], np.uint64)},
        state,
    )
    assert state.memory.traffic.bytes_loaded == 4 * (64 + 8)
    assert state.memory.traffic.lines == 2 + 1
    addresses = np.array([LANE * 128, LANE[::-1] // 2 * 128, LANE * 0]).astype(np.uint64)
    assert count_lines(addresses, np.ones((3, 64), bool)) == 64 + 32 + 1


def descriptor(address, size):
    return {"s8": address & 0xFFFFFFFF, "s9": address >> 32, "s10": size, "s11": 0x27000}


def test_buffers_mask_what_is_beyond_their_end():
    data = np.arange(256, dtype=np.uint32) + 1
    state, (source,) = start(data)
    offsets = np.where(LANE % 2, LANE * 16, 0x80000000)
    text = "buffer_load_dwordx2 v[4:5], v2, s[8:11], 0 offen offset:4\nbuffer_store_dword v3, v2, s[8:11], s12 offen"
    execute(text, {**descriptor(source, 1024), "v2": offsets, "v3": 7, "s12": 8, "v4": 99, "v5": 99}, state)
    odd = LANE % 2 == 1
    assert (fetch(state, "v4")[:, odd] == data[LANE[odd] * 4 + 1]).all()
    assert (fetch(state, "v4")[:, ~odd] == 0).all()
    assert (contents(state, 0, np.uint32)[LANE[odd] * 4 + 2] == 7).all()
    with pytest.raises(SimulationError, match="straddles"):
        execute("buffer_load_dwordx2 v[4:5], v2, s[8:11], 0 offen", {**descriptor(source, 1020), "v2": 1016}, state)


def test_loads_straight_into_lds():
    data = np.arange(1024, dtype=np.uint32)
    state, (source,) = start(data)
    state.select(np.array([1]))
    execute(
        "global_load_lds_dwordx4 v[0:1], off", {"m0": 256, "v[0:1]": source + 16 * LANE[::-1].astype(np.uint64)}, state
    )
    assert (state.lds.store.words[64 : 64 + 256].reshape(64, 4) == data[:256].reshape(64, 4)[::-1]).all()


def test_scalar_loads():
    data = np.arange(64, dtype=np.uint32)
    state, (source,) = start(data)
    execute(
        "s_load_dwordx4 s[4:7], s[2:3], 0x10\ns_load_dword s8, s[2:3], s9",
        {"s[2:3]": np.full(WAVES, source), "s9": np.array([0, 4, 8])},
        state,
    )
    assert [fetch(state, f"s{4 + word}")[1] for word in range(4)] == [4, 5, 6, 7]
    assert fetch(state, "s8").tolist() == [0, 1, 2]


def test_scratch_is_private():
    state = execute(
        "scratch_store_dwordx2 off, v[2:3], off offset:8\nscratch_load_dword v4, off, s2 offset:4",
        {"v2": THREAD, "v3": 5, "s2": 4},
    )
    assert (fetch(state, "v4") == THREAD).all()
    with pytest.raises(OutOfBoundsError, match="scratch access of 4 bytes at 64 of 64"):
        execute("scratch_load_dword v4, off, off offset:64", {})


def test_bounds_name_the_neighbour():
    state, (first, _) = start(np.zeros(64, np.uint32), np.zeros(64, np.uint32))
    where = np.where(THREAD == 2 * 64 + 5, 256, 0)
    with pytest.raises(
        OutOfBoundsError, match=r"line 1: global_load_dword v4.*byte 256 of argument 0, which has 256.*wave 2, lane 5"
    ):
        execute("global_load_dword v4, v2, s[2:3]", {"s[2:3]": first, "v2": where}, state)


def test_the_last_bytes_of_an_argument():
    state, (first, _) = start(np.zeros(64, np.uint32), np.zeros(64, np.uint32))
    for provenance in (None, (0,), (0, 1)):
        for offset, is_inside in ((248, True), (252, False), (256, False)):
            load(state, {"s[2:3]": first, "v2": offset})
            (step,) = decode(parse("global_load_dwordx2 v[4:5], v2, s[2:3]", "gfx942"))
            step.instruction.provenance = provenance
            if is_inside:
                step.run(state)
            else:
                with pytest.raises(OutOfBoundsError, match=f"byte {offset} of argument 0"):
                    step.run(state)


def test_provenance_names_both():
    state, (first, second) = start(np.zeros(64, np.uint32), np.zeros(64, np.uint32))
    load(state, {"s[2:3]": first, "v2": second - first})
    (step,) = decode(parse("global_load_dword v4, v2, s[2:3]", "gfx942"))
    step.run(state)  # without knowing where the address comes from, any allocation is good
    assert state.memory.traffic.unattributed == 1
    step.instruction.provenance = (0,)
    with pytest.raises(ProvenanceError, match="derived from argument 0 lands in argument 1, at byte 0 of 256"):
        step.run(state)


INTEGER = {
    "add": lambda old, value: old + value,
    "sub": lambda old, value: old - value,
    "smax": lambda old, value: max(old, value, key=lambda v: v - (v >> 31 << 32)),
    "umin": min,
    "and": lambda old, value: old & value,
    "or": lambda old, value: old | value,
    "xor": lambda old, value: old ^ value,
    "swap": lambda old, value: value,
}


@pytest.mark.parametrize("name", INTEGER)
def test_global_atomics_go_lane_by_lane(name):
    state, (target,) = start(np.array([5, 0x80000001, 77, 9], np.uint32))
    place = THREAD % 4
    execute(f"global_atomic_{name} v5, v2, v3, s[2:3] sc0", {"s[2:3]": target, "v2": place * 4, "v3": RANDOM[0]}, state)
    memory, old = [5, 0x80000001, 77, 9], np.zeros((WAVES, 64), np.uint32)
    for wave, lane in np.ndindex(WAVES, 64):
        where = place[wave, lane]
        old[wave, lane] = memory[where]
        memory[where] = INTEGER[name](memory[where], int(RANDOM[0][wave, lane])) & 0xFFFFFFFF
    assert contents(state, 0, np.uint32).tolist() == memory
    assert (fetch(state, "v5") == old).all()


def test_compare_and_swap_has_one_winner():
    state, (target,) = start(np.array([3], np.uint64))
    text = "global_atomic_cmpswap_x2 v[8:9], v2, v[4:7], s[2:3] glc"
    execute(
        text,
        {
            "s[2:3]": target,
            "v2": 0,
            "v[4:5]": THREAD.astype(np.uint64) + np.uint64(100),
            "v[6:7]": np.full((WAVES, 64), 3, np.uint64),
        },
        state,
    )
    assert contents(state, 0, np.uint64)[0] == 100
    assert (fetch(state, "v[8:9]") == 3).sum() == 1


def test_float_atomics():
    state, (target,) = start(np.array([1.5, 0, 0], np.float32))
    text = """
        global_atomic_add_f32 v2, v3, s[2:3]
        global_atomic_pk_add_f16 v2, v4, s[2:3] offset:4
        global_atomic_pk_add_bf16 v2, v5, s[2:3] offset:8
    """
    execute(
        text,
        {"s[2:3]": target, "v2": 0, "v3": np.full((WAVES, 64), 0.5, np.float32), "v4": 0x3C004000, "v5": 0x3F804000},
        state,
    )
    assert contents(state, 0, np.float32)[0] == 1.5 + 0.5 * WAVES * 64
    assert contents(state, 0, np.float16)[2:4].tolist() == [2 * WAVES * 64, WAVES * 64]
    assert (contents(state, 0, np.uint16)[4:6].astype(np.uint32) << 16).view(np.float32).tolist() == [
        2 * WAVES * 64,
        WAVES * 64,
    ]


def test_buffer_and_lds_atomics():
    state, (target,) = start(np.zeros(4, np.uint32))
    execute(
        "buffer_atomic_add v4, v2, s[8:11], 0 offen",
        {**descriptor(target, 16), "v2": np.where(LANE < 32, 0, 64), "v4": 1},
        state,
    )
    assert contents(state, 0, np.uint32).tolist() == [WAVES * 32, 0, 0, 0]
    state.lds.store.words[:4] = 0
    state.lds.is_written.bytes[:16] = 1
    text = "ds_add_rtn_u32 v5, v2, v4\nds_max_u32 v3, v5\nds_cmpst_rtn_b32 v6, v7, v8, v9 offset:8"
    execute(text, {"v2": 0, "v3": 4, "v4": 1, "v7": 0, "v8": 0, "v9": THREAD + 1}, state)
    assert sorted(fetch(state, "v5").ravel().tolist()) == list(range(WAVES * 64))
    assert state.lds.store.words[:3].tolist() == [WAVES * 64, WAVES * 64 - 1, 1]
    with pytest.raises(SimulationError, match="not a multiple of 4"):
        execute("ds_add_u32 v2, v4", {"v2": 2}, state)
