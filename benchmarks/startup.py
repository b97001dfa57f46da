"""How long it takes until something happens: --help, --version, imports, and the demo model's first token.

python benchmarks/startup.py --repeats 5
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "startup.json"
PYTHON = [sys.executable]
COMMANDS = {
    "evenflow --help": [*PYTHON, "-m", "evenflow", "--help"],
    "evenflow --version": [*PYTHON, "-m", "evenflow", "--version"],
    "evenflow generate --help": [*PYTHON, "-m", "evenflow", "generate", "--help"],
    "import evenflow": [*PYTHON, "-c", "import evenflow"],
    "import torch": [*PYTHON, "-c", "import torch"],
    "first token of the demo model": [*PYTHON, "-m", "evenflow", "generate", "Once", "--max-tokens", "1"],
}
LIMITS_S = {"evenflow --help": 0.3, "evenflow --version": 0.3, "first token of the demo model": 5.0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    found = {}
    for name, command in COMMANDS.items():
        times = []
        for _ in range(args.repeats + 1):
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            times.append(time.perf_counter() - start)
        found[name] = times[1:]  # the first fills the file cache
        print(
            f"{name:32s} median {statistics.median(found[name]):6.3f} s   worst {max(found[name]):6.3f} s", flush=True
        )
    record = {"seconds": found, "python": platform.python_version()}
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if any(statistics.median(found[name]) > limit for name, limit in LIMITS_S.items()) else 0


if __name__ == "__main__":
    sys.exit(main())
