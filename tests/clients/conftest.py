import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "cpu"))

from serving import ServerProcess


@pytest.fixture(scope="session")
def server():
    with ServerProcess() as process:
        yield process
        process.wait_idle()


def pytest_collection_modifyitems(items):
    """Warnings of the clients' own are not ours to mend."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))
