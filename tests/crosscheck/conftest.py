import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from evenflow.crosscheck.compiling import Compiled, Job, compile_all

HERE = Path(__file__).parent


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
    from planted import DEFECTS, SOUND  # needs triton, without which every test here is skipped

    jobs = [Job(arch, SOUND) for arch in ("gfx1100", "sm_90")] + [Job("gfx942", SOUND + DEFECTS)]
    return {(result.target, result.label): result for result in compile_all(jobs, num_processes=2)}
