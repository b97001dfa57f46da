import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the compile checks need triton")

from planted import SOUND, Specialization, big_dot, copy, paged_dot

from evenflow.crosscheck.compiling import Compiled, Job, compile_all

HERE = Path(__file__).parent
DEFECTS = [
    big_dot("spills", 256, 128, 32, num_warps=1, num_stages=1),
    big_dot("too-much-lds", 128, 128, 128, num_warps=8, num_stages=3),
    big_dot("no-matrix", 8, 16, 16, num_warps=1, num_stages=1),
    paged_dot("narrow", aligned=False),
    copy("noisy"),
    copy("aborting"),
    copy("missing"),
    copy("refused"),
    Specialization("planted:copy_kernel", {"x_ptr": "*fp32", "y_ptr": "*fp32"}, {"BLOCK": 64}, (), 4, 1, "misnamed"),
    copy("copy", "after-the-abort"),
]


@pytest.fixture(scope="session")
def dumps(tmp_path_factory: pytest.TempPathFactory):
    """dumps(arch): what triton made of the sound kernels, by label; see dump.py."""
    made: dict[str, dict] = {}

    def dump(arch: str) -> dict:
        if arch not in made:
            folder = tmp_path_factory.mktemp(arch)
            path = os.pathsep.join(path for path in sys.path if path)
            command = [sys.executable, str(HERE / "dump.py"), arch, str(folder)]
            subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})
            made[arch] = json.loads((folder / "dump.json").read_text())
        return made[arch]

    return dump


@pytest.fixture(scope="session")
def compiled() -> dict[tuple[str, str], Compiled]:
    """The sound kernels for one target of each kind, and the defects for gfx942; by (target, label)."""
    jobs = [Job(arch, SOUND) for arch in ("gfx1100", "sm_90")] + [Job("gfx942", SOUND + DEFECTS)]
    return {(result.target, result.label): result for result in compile_all(jobs, num_processes=2)}
