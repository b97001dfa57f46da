"""`python dump_dependent.py ARCH FOLDER [KERNEL...]`: code of each kernel that may be launched dependently, by label.

One specialization of each, of all of them or of those named. A process of its own, as triton wants it: one target each.
"""

import json
import os
import sys
from pathlib import Path

from evenflow.crosscheck.child import make
from evenflow.crosscheck.compiling import function_of
from evenflow.crosscheck.targets import find_target
from evenflow.kernels.specializations import all_specializations

arch, folder, names = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
os.environ |= {"TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_DEFAULT_FP_FUSION": "1"}
chosen = {}
for specialization in all_specializations(arch):
    name = function_of(specialization.kernel)
    if "PDL" in specialization.constexprs and (not names or name in names):
        chosen.setdefault(name, specialization)
target = find_target(arch)
text = "amdgcn" if target.is_amd else "ptx"
code = {name: make(specialization, target).asm[text] for name, specialization in chosen.items()}
(folder / "code.json").write_text(json.dumps(code))
