"""The checkers on hand-written code: waits, arrivals of loads into LDS, and where addresses come from."""

import numpy as np
import pytest
from snippets import fetch, load, machine

from evenflow.crosscheck.cdna.arrivals import Arrivals
from evenflow.crosscheck.cdna.dataflow import analyse
from evenflow.crosscheck.cdna.decode import decode
from evenflow.crosscheck.cdna.errors import MissingWaitError, UninitializedReadError
from evenflow.crosscheck.cdna.parser import Argument, parse
from evenflow.crosscheck.cdna.waits import check_waits

LANE = np.arange(64)


def waits(*lines):
    steps = decode(parse("\n".join(lines), "gfx942"))
    check_waits(steps, [(np.arange(2), 0, len(steps))])


LOAD = "global_load_dword v1, v0, s[2:3]"
SECOND = "global_load_dword v2, v0, s[2:3]"
STORE = "global_store_dword v0, v3, s[2:3]"


class TestWaits:
    @pytest.mark.parametrize(
        "use",
        ["v_mov_b32 v5, v1", "v_mov_b32 v1, 0", "global_store_dword v1, v3, s[2:3]", "v_readfirstlane_b32 s4, v1"],
    )
    def test_a_use_before_the_wait(self, use):
        with pytest.raises(MissingWaitError, match=r"line 2: .*uses v1 while line 1: global_load.*s_waitcnt vmcnt"):
            waits(LOAD, use)
        waits(LOAD, "s_waitcnt vmcnt(0)", use)
        waits(LOAD, "v_mov_b32 v5, v2")

    def test_operations_of_one_counter_finish_in_order(self):
        waits(LOAD, SECOND, "s_waitcnt vmcnt(1)", "v_mov_b32 v5, v1")
        waits(LOAD, STORE, "s_waitcnt vmcnt(1)", "v_mov_b32 v5, v1")
        with pytest.raises(MissingWaitError, match="uses v2 while line 2"):
            waits(LOAD, SECOND, "s_waitcnt vmcnt(1)", "v_mov_b32 v5, v2")

    def test_a_later_load_may_overwrite_an_earlier_one(self):
        waits(LOAD, LOAD, "s_waitcnt vmcnt(0)", "v_mov_b32 v5, v1")
        with pytest.raises(MissingWaitError, match="uses v1"):
            waits(LOAD, "ds_read_b32 v1, v0")  # of another counter: it may come first

    def test_scalar_loads_finish_in_any_order(self):
        loads = ("s_load_dword s4, s[2:3], 0x0", "s_load_dword s5, s[2:3], 0x4")
        with pytest.raises(MissingWaitError, match="uses s4"):
            waits(*loads, "s_waitcnt lgkmcnt(1)", "s_mov_b32 s6, s4")
        waits(*loads, "s_waitcnt lgkmcnt(0)", "s_mov_b32 s6, s4")
        with pytest.raises(MissingWaitError, match="uses s4"):
            waits(loads[0], "s_load_dword s4, s[2:3], 0x8")

    def test_a_wait_for_another_counter_does_not_help(self):
        with pytest.raises(MissingWaitError, match="lgkmcnt"):
            waits("ds_read_b64 v[2:3], v0", "s_waitcnt vmcnt(0)", "v_mov_b32 v5, v3")

    def test_sources_of_stores_may_be_reused(self):
        waits(STORE, "v_mov_b32 v3, 0", "ds_write_b32 v0, v3", "v_mov_b32 v3, 0")

    def test_returning_atomics_and_lane_moves(self):
        with pytest.raises(MissingWaitError, match="uses v4 while line 1: global_atomic_add"):
            waits("global_atomic_add v4, v0, v1, s[2:3] sc0", "v_mov_b32 v5, v4")
        waits("global_atomic_add v0, v1, s[2:3]", "v_mov_b32 v5, v1")
        with pytest.raises(MissingWaitError, match="uses v4 while line 1: ds_bpermute"):
            waits("ds_bpermute_b32 v4, v0, v1", "v_add_u32 v5, v4, v4")

    def test_a_barrier_behind_a_write(self):
        with pytest.raises(MissingWaitError, match="line 2: s_barrier: passed while line 1: ds_write"):
            waits("ds_write_b32 v0, v1", "s_barrier")
        waits("ds_write_b32 v0, v1", "s_waitcnt lgkmcnt(0)", "s_barrier")

    def test_the_path_counts_not_the_text(self):
        steps = decode(parse("\n".join([LOAD, "s_waitcnt vmcnt(0)", "v_mov_b32 v5, v1"]), "gfx942"))
        check_waits(steps, [(np.array([0]), 0, 3), (np.array([1]), 0, 2), (np.array([1]), 2, 3)])
        with pytest.raises(MissingWaitError):
            check_waits(steps, [(np.array([0]), 0, 3), (np.array([1]), 0, 1), (np.array([1]), 2, 3)])


class TestArrivals:
    def start(self):
        state = machine("gfx950", waves=2)
        block = state.memory.allocate(np.arange(1024, dtype=np.uint8), "data", (0,))
        load(state, {"s[2:3]": np.full(2, block.address), "v0": LANE * 4, "v1": LANE * 4, "m0": 0})
        state.lds.arrivals = Arrivals(state.lds.store.bytes.size, state.workgroup)
        state.select(np.array([0]))
        return state

    def do(self, state, line):
        (step,) = decode(parse(line, "gfx950"))
        run = state.lds.arrivals.counting(step.run) if "vmcnt" in step.operation.counters else step.run
        run(state)

    def test_the_wave_itself_must_wait(self):
        state = self.start()
        self.do(state, "global_load_lds_dword v0, s[2:3]")
        self.do(state, "global_load_dword v5, v0, s[2:3]")
        with pytest.raises(MissingWaitError, match="ds_read_b32 v2, v1: touches LDS whose load"):
            self.do(state, "ds_read_b32 v2, v1")
        state.lds.arrivals.waiting(2)(state)
        with pytest.raises(MissingWaitError):
            self.do(state, "ds_write_b32 v1, v0")
        state.lds.arrivals.waiting(1)(state)
        self.do(state, "ds_read_b32 v2, v1")
        assert (fetch(state, "v2")[0].view(np.uint8) == np.arange(256)).all()

    def test_another_wave_needs_the_wait_before_the_barrier(self):
        state = self.start()
        self.do(state, "global_load_lds_dword v0, s[2:3]")
        state.lds.arrivals.pass_barrier(0)
        state.lds.races.open_epoch(0)
        state.lds.arrivals.waiting(0)(state)
        state.select(np.array([1]))
        with pytest.raises(MissingWaitError, match="a barrier if that is another wave"):
            self.do(state, "ds_read_b32 v2, v1")
        state.lds.arrivals.pass_barrier(0)
        self.do(state, "ds_read_b32 v2, v1")


def analysed(text, arch="gfx942", **descriptor):
    """Provenance by line of code that touches memory, for a kernel with pointers at 0 and 8 and a number at 16."""
    kernel = parse(text, arch)
    kernel.descriptor = {"user_sgpr_kernarg_segment_ptr": 1, "user_sgpr_count": 2, **descriptor}
    kernel.arguments = [Argument(0, 8, "global_buffer"), Argument(8, 8, "global_buffer"), Argument(16, 4, "by_value")]
    steps = decode(kernel)
    analyse(kernel, steps)
    return {step.instruction.line: step.instruction.provenance for step in steps if step.operation.address}


class TestProvenance:
    def test_arithmetic_keeps_it_and_loaded_indices_do_not_count(self):
        found = analysed("""s_load_dwordx4 s[4:7], s[0:1], 0x0
            s_load_dword s8, s[0:1], 0x10
            v_lshl_add_u32 v1, v0, 2, s8
            global_load_dword v2, v1, s[6:7]
            v_mov_b32 v3, s5
            v_add_co_u32 v4, vcc, s4, v2
            v_addc_co_u32 v5, vcc, 0, v3, vcc
            global_load_dword v6, v[4:5], off""")
        assert found == {1: (-1,), 2: (-1,), 4: (1,), 8: (0,)}

    def test_a_choice_of_two_pointers_allows_both(self):
        found = analysed(
            """s_load_dwordx4 s[4:7], s[0:1], 0x0
            s_cmp_eq_u32 s2, 0
            s_cselect_b64 s[8:9], s[4:5], s[6:7]
            global_load_dword v2, v0, s[8:9]
            s_cbranch_scc1 .L1
            s_mov_b64 s[4:5], s[6:7]
            .L1:
            global_load_dword v3, v0, s[4:5]
            s_endpgm""".replace("            .L1", ".L1")
        )
        assert found == {1: (-1,), 4: (0, 1), 8: (0, 1)}

    def test_a_loop_is_followed_until_nothing_changes(self):
        found = analysed("""s_load_dwordx4 s[4:7], s[0:1], 0x0
            s_mov_b64 s[8:9], 0
            s_mov_b64 s[10:11], 0
.L1:
            global_load_dword v2, v0, s[4:5]
            s_mov_b64 s[4:5], s[8:9]
            s_mov_b64 s[8:9], s[10:11]
            s_mov_b64 s[10:11], s[6:7]
            s_cbranch_scc1 .L1
            s_endpgm""")
        assert found[5] == (0, 1)

    @pytest.mark.parametrize(
        "carry",
        [
            "scratch_store_dwordx2 off, v[2:3], off offset:16\nscratch_load_dwordx2 v[4:5], off, off offset:16",
            "ds_write_b64 v0, v[2:3]\nds_read_b64 v[4:5], v0",
            "v_writelane_b32 v9, s4, 3\nv_writelane_b32 v9, s5, 4\nv_writelane_b32 v9, s7, 5\n"
            "v_readlane_b32 s10, v9, 3\nv_readlane_b32 s11, v9, 4\nv_mov_b32 v4, s10\nv_mov_b32 v5, s11",
            "v_accvgpr_write_b32 a2, v2\nv_accvgpr_write_b32 a3, v3\n"
            "v_accvgpr_read_b32 v4, a2\nv_accvgpr_read_b32 v5, a3",
            "v_mov_b64 v[4:5], v[2:3]",
        ],
    )
    def test_it_survives_spills(self, carry):
        found = analysed(f"""s_load_dwordx4 s[4:7], s[0:1], 0x0
            v_mov_b32 v2, s4
            v_mov_b32 v3, s5
            {carry}
            global_load_dword v6, v[4:5], off""")
        assert list(found.values())[-1] == (0,)

    def test_preloaded_arguments(self):
        descriptor = {"user_sgpr_kernarg_preload_length": 5, "user_sgpr_count": 7}
        assert analysed("global_load_dword v2, v0, s[4:5]", **descriptor) == {1: (1,)}

    def test_an_address_from_nowhere_is_not_attributed(self):
        assert analysed("v_mov_b32 v1, 0\nglobal_load_dword v2, v[0:1], off") == {2: None}


class TestUnwrittenRegisters:
    def run(self, text):
        kernel = parse(text, "gfx942")
        kernel.descriptor = {"user_sgpr_kernarg_segment_ptr": 1, "user_sgpr_count": 2}
        steps = decode(kernel)
        analyse(kernel, steps)
        state = machine()
        with np.errstate(all="ignore"):
            for step in steps:
                step.run(state)

    @pytest.mark.parametrize(
        ("text", "name"),
        [
            ("v_add_u32 v1, v0, v7", "v7"),
            ("v_fmac_f32 v8, v0, v0", "v8"),
            ("s_add_u32 s5, s0, s9", "s9"),
            ("v_cndmask_b32 v1, v0, v0, vcc", "vcc_lo, vcc_hi"),
            ("v_accvgpr_read_b32 v1, a4", "a4"),
        ],
    )
    def test_a_read_without_a_writer(self, text, name):
        with pytest.raises(
            UninitializedReadError, match=f"line 1: .*reads {name}, which nothing has written on any path"
        ):
            self.run(text)

    @pytest.mark.parametrize(
        ("use", "name"),
        [
            ("v_mov_b32 v1, v2", None),
            ("v_mov_b32 v1, v3", "v3"),
            ("v_cndmask_b32 v1, v0, v0, s[6:7]", "s6, s7"),
            ("v_mov_b32 v3, 0\nv_lshl_add_u64 v[4:5], v[2:3], 0, v[2:3]", None),
            ("v_mad_u64_u32 v[2:3], s[8:9], v0, v0, v[2:3]\nv_mov_b32 v1, v3", "v3"),
        ],
    )
    def test_a_wide_sum_of_which_the_lower_half_is_wanted(self, use, name):
        """The upper half of its addend is read by the hardware and spoils the upper half of the sum, no more."""
        code = f"v_mov_b32 v10, v0\nv_mad_u64_u32 v[2:3], s[6:7], v0, v0, v[10:11]\n{use}"
        if name is None:
            self.run(code)
            return
        with pytest.raises(UninitializedReadError, match=f"reads {name}, which nothing has written"):
            self.run(code)
        self.run(f"v_mov_b32 v11, 0\n{code}")

    def test_a_wide_sum_needs_the_lower_half_of_its_addend(self):
        with pytest.raises(UninitializedReadError, match="reads v10, which nothing has written"):
            self.run("v_mov_b32 v11, 0\nv_mad_u64_u32 v[2:3], s[6:7], v0, v0, v[10:11]")

    def test_what_the_launch_sets_and_what_only_keeps_a_part(self):
        self.run("v_mov_b32 v1, s1\ns_mov_b32 s3, s2\nv_writelane_b32 v5, s1, 0\nv_cvt_pk_fp8_f32 v6, v0, v1")

    @pytest.mark.parametrize(
        ("text", "name"),
        [
            ("v_pk_add_f32 v[4:5], v[0:1], v[8:9] op_sel_hi:[1,0]", None),
            ("v_pk_fma_f32 v[4:5], v[0:1], v[8:9], v[0:1] op_sel_hi:[1,0,1]", None),
            ("v_pk_mul_f32 v[4:5], v[0:1], v[8:9]", "v9"),
            ("v_pk_mul_f32 v[4:5], v[0:1], v[8:9] op_sel:[0,1] op_sel_hi:[1,1]", "v9"),
            ("v_pk_mov_b32 v[4:5], v[8:9], v[0:1] op_sel:[0,1]", None),
            ("v_pk_mov_b32 v[4:5], v[8:9], v[0:1] op_sel:[1,0]", "v9"),
        ],
    )
    def test_of_a_pair_only_the_selected_words_are_read(self, text, name):
        code = f"v_mov_b32 v1, v0\nv_mov_b32 v8, v0\n{text}"
        if name is None:
            self.run(code)
            return
        with pytest.raises(UninitializedReadError, match=f"reads {name}, which nothing has written"):
            self.run(code)
