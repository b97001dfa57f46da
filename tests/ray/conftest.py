import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray.serve", reason='needs Ray: pip install -e ".[test,ray]"')
sys.path.append(str(Path(__file__).parents[1] / "cpu"))

os.environ["RAY_DEDUP_LOGS"] = "0"  # what one replica says is not left out because another one says it as well
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # the future's default; the present one warns
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


def pytest_collection_modifyitems(items):
    """Warnings of Ray's own are not ours to mend."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))
