"""`python dump.py ARCH FOLDER`: what triton makes of the sound kernels, what we read, and what ptxas said meanwhile.

A process of its own, as triton wants it: one target each.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

os.environ |= {"TRITON_DUMP_PTXAS_LOG": "1", "TRITON_DEFAULT_FP_FUSION": "1"}

from planted import SOUND

from evenflow.crosscheck.child import make, read
from evenflow.crosscheck.compiling import label_of
from evenflow.crosscheck.targets import find_target

FIELDS = ("registers", "spills", "scratch_bytes", "shared_bytes", "occupancy", "matrix", "loads", "argument_loads")

arch, folder = sys.argv[1], Path(sys.argv[2])
os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
found = {}
for specialization in SOUND:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        made = make(specialization, find_target(arch))
    resources = read(made, specialization, find_target(arch))
    texts = {name: text for name, text in made.asm.items() if isinstance(text, str)}
    found[label_of(specialization.kernel, specialization.name)] = {
        "texts": texts | {"ptxas": printed.getvalue()},
        "read": {name: getattr(resources, name) for name in FIELDS},
    }
(folder / "dump.json").write_text(json.dumps(found))
