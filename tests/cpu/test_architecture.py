"""The dependency direction and the vendor rule are tables, so that they cannot rot."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2] / "src" / "evenflow"

MAY_IMPORT: dict[str, set[str]] = {
    "platforms": set(),
    "sampling_params": set(),
    "model_config": set(),
    "demo": set(),
    "request": {"sampling_params"},
    "config": {"platforms", "model_config"},
    "model_files": {"demo"},
    "chat_template": set(),
    "tokenizer": {"model_files", "chat_template"},
    "progress": {"request"},
    "detokenizer": {"tokenizer"},
    "scheduler": {"request", "sampling_params"},
    "guided": {"request", "sampling_params", "tokenizer"},
    "kernels": {"platforms"},
    "crosscheck": {"kernels", "platforms"},
    "distributed": {"kernels", "model_config", "platforms"},
    "layers": {"kernels", "distributed", "model_config"},
    "models": {"layers", "model_config"},
    "runner": {
        "models",
        "layers",
        "kernels",
        "distributed",
        "request",
        "config",
        "model_config",
        "model_files",
        "platforms",
        "sampling_params",
    },
    "engine": {
        "garbage",
        "scheduler",
        "request",
        "sampling_params",
        "config",
        "model_config",
        "model_files",
        "platforms",
        "tokenizer",
        "detokenizer",
        "guided",
        "runner",
        "distributed",
    },
    "beam_search": {"sampling_params"},
    "llm": {
        "garbage",
        "engine",
        "beam_search",
        "progress",
        "request",
        "sampling_params",
        "config",
        "model_config",
        "tokenizer",
    },
    "server": {
        "garbage",
        "engine",
        "request",
        "sampling_params",
        "config",
        "guided",
        "model_config",
        "model_files",
        "platforms",
        "tokenizer",
        "detokenizer",
        "chat_template",
    },
    "bench": {
        "progress",
        "config",
        "llm",
        "model_config",
        "model_files",
        "plan",
        "platforms",
        "request",
        "sampling_params",
        "scheduler",
        "engine",
    },
    "parity": {"bench", "llm", "model_files", "request", "sampling_params"},
    "ray": {"server", "engine", "config"},
    "plan": {"config", "model_config", "model_files", "platforms"},
    "doctor": {"platforms", "demo"},
    "cli": {
        "llm",
        "server",
        "ray",
        "engine",
        "plan",
        "doctor",
        "bench",
        "parity",
        "tokenizer",
        "model_files",
        "crosscheck",
        "kernels",
        "config",
        "platforms",
        "request",
        "sampling_params",
    },
    "__main__": {"cli"},
}
NO_TORCH = {
    "sampling_params",
    "request",
    "config",
    "model_config",
    "model_files",
    "tokenizer",
    "detokenizer",
    "chat_template",
    "scheduler",
    "beam_search",
    "progress",
    "guided",
    "server",
    "ray",
    "plan",
}
# These may import torch inside functions, when it is certain that it is needed.
LAZY_TORCH = {"cli", "doctor", "platforms", "crosscheck", "bench", "parity"}
# Except these, which are tensors and are themselves imported inside functions.
EAGER_FOLDERS = ("crosscheck/cases/",)
NO_TORCH_FILES = {
    "engine/client.py",
    "engine/generation.py",
    "engine/input.py",
    "engine/messages.py",
    "engine/opening.py",
    "engine/output.py",
    "engine/stats.py",
    "demo/__init__.py",
}
VENDORS = re.compile(r"\b(nvidia|amd|rocm|hip|is_hip|gfx\w+|sm_\d+)\b", re.IGNORECASE)
VENDOR_PACKAGES = {"platforms", "plan", "doctor", "demo", "crosscheck"}
VENDOR_FILES = {"kernels/tuning.py", "kernels/specializations.py"}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(imported name, at module level), inside functions and TYPE_CHECKING too."""
    tree = ast.parse(path.read_text())
    top_level = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top_level
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) in top_level


def violations(root: Path) -> Iterator[str]:
    for path in sorted(root.rglob("*.py")):
        file = path.relative_to(root).as_posix()
        package = file.split("/")[0].removesuffix(".py")
        if package == "__init__":
            continue
        for name, at_top in imports(path):
            top, _, rest = name.partition(".")
            target = rest.partition(".")[0]
            forbidden = package in NO_TORCH or file in NO_TORCH_FILES
            is_lazy = package in LAZY_TORCH and not file.startswith(EAGER_FOLDERS)
            if top in ("torch", "triton") and (forbidden or (is_lazy and at_top)):
                yield f"{file} imports {top}"
            is_ours = top == root.name and target not in ("", "__version__")
            if is_ours and target != package and target not in MAY_IMPORT[package]:
                yield f"{file} imports {target}; {package} may not"


def vendor_mentions(root: Path) -> Iterator[str]:
    for path in sorted(root.rglob("*.py")):
        file = path.relative_to(root).as_posix()
        if file.split("/")[0].removesuffix(".py") in VENDOR_PACKAGES or file in VENDOR_FILES:
            continue
        code = path.read_text()
        tree = ast.parse(code)
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        names |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        docs = {ast.get_docstring(n, clean=False) for n in ast.walk(tree) if isinstance(n, ast.Module)}
        strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        for text in sorted(names | (strings - docs)):
            if len(text) < 40 and VENDORS.search(text):
                yield f"{file} names a vendor: {text!r}"


def test_the_table_has_no_cycle():
    TopologicalSorter(MAY_IMPORT).prepare()


def test_every_module_follows_the_table():
    assert list(violations(ROOT)) == []


def test_vendors_are_named_in_platforms_only():
    assert list(vendor_mentions(ROOT)) == []


def test_violations_are_found(tmp_path):
    root = tmp_path / "evenflow"
    for package in ("scheduler", "kernels", "engine"):
        (root / package).mkdir(parents=True)
    (root / "scheduler" / "scheduler.py").write_text("import torch\nfrom evenflow.request import Request\n")
    (root / "kernels" / "attention.py").write_text("import torch\ndef f():\n    from evenflow.models import llama\n")
    (root / "engine" / "output.py").write_text("import torch\nif is_hip: arch = 'gfx942'\n")
    assert sorted(violations(root)) == [
        "engine/output.py imports torch",
        "kernels/attention.py imports models; kernels may not",
        "scheduler/scheduler.py imports torch",
    ]
    assert len(list(vendor_mentions(root))) == 2
