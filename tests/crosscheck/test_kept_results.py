"""The last full result that is kept: it covers what there is, nothing in it fails, and the page says what it says."""

import json
from pathlib import Path

import pytest

from evenflow.crosscheck.running import ARCHS
from evenflow.crosscheck.summary import compiled_table, kernels_of, runs_table
from evenflow.crosscheck.targets import TARGETS
from evenflow.kernels.tuning import many_row_tiles, merges_in_decode

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def kept():
    return json.loads((DOCS / "crosscheck" / "triton-3.9.json").read_text())


def not_launched(target: str) -> set[str]:
    """Kernels that are another's work there, or the library's."""
    merging = {"merge_pieces"} if merges_in_decode(target) else set()
    return merging if many_row_tiles(target) else merging | {"many_row_gated_linear"}


def test_every_kernel_was_compiled_for_every_target_and_run_on_every_simulator(kept):
    everything = kernels_of(kept["results"])
    for target in TARGETS:
        compiled = kernels_of([row for row in kept["results"] if row["target"] == target])
        assert compiled == everything - not_launched(target)
    for target in ARCHS:
        runs = [row for row in kept["runs"] if row["target"] == target]
        assert {kernel["kernel"] for row in runs for kernel in row["kernels"]} == everything - not_launched(target)


def test_nothing_failed(kept):
    assert kept["failures"] == []
    assert all(row["error"] == "" and row["error_ratio"] <= 1 for row in kept["runs"])
    assert all(row["resources"] for row in kept["results"])
    assert kept["environment"]["triton"].startswith("3.9.")


def test_the_page_has_its_tables(kept):
    page = (DOCS / "crosscheck.md").read_text()
    assert compiled_table(kept["results"]) in page
    assert runs_table(kept["runs"]) in page
