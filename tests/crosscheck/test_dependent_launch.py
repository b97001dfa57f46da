"""Programmatic dependent launch: in the code of architectures that have it and no other, and waits that come first."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernel checks compile")

READ_WEIGHTS_FIRST = {"rms_norm", "add_rms_norm", "linear"}


def code_of(arch: str, folder: Path, *kernels: str) -> dict[str, str]:
    """PTX or AMD assembly by kernel."""
    script = Path(__file__).parent / "dump_dependent.py"
    path = os.pathsep.join(path for path in sys.path if path)
    subprocess.run(
        [sys.executable, str(script), arch, str(folder), *kernels], check=True, env=os.environ | {"PYTHONPATH": path}
    )
    return json.loads((folder / "code.json").read_text())


@pytest.mark.parametrize(("arch", "number"), [("sm_80", 0), ("sm_100", 2), ("gfx942", 0), ("gfx1100", 0)])
def test_architectures_that_have_it(arch, number, tmp_path):
    found = code_of(arch, tmp_path, "silu_and_mul", "linear")
    assert {name: code.count("griddepcontrol") for name, code in found.items()} == {
        "silu_and_mul": number,
        "linear": number,
    }


def test_every_kernel_waits_before_it_reads_writes_or_returns(tmp_path):
    """But for weights."""
    found = code_of("sm_90", tmp_path)
    assert found.keys() == READ_WEIGHTS_FIRST | {
        "expand_rows", "plan", "rotary_and_store", "decode_attention", "prefill_attention", "silu_and_mul",
        "few_row_linear", "many_row_gated_linear",
    }  # fmt: skip
    for name, code in found.items():
        assert code.count("griddepcontrol.launch_dependents") == 1, name
        before, *after = code.split("griddepcontrol.wait")
        assert len(after) == 1, name
        body = before[before.index(".entry") :]
        assert re.search(r"\b(st|atom|red|ret|bra|cp)\b", body) is None, name
        assert (re.search(r"\bld\.global", body) is not None) == (name in READ_WEIGHTS_FIRST), name
        assert re.search(r"\b(ld|cp\.async\.\S*shared\S*)\.global", after[0]), name
