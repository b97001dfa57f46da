"""A copy of a kernel's module with a bug in it."""

import sys
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch


@contextmanager
def planted(module: ModuleType, code: str, bug: str, directory: Path) -> Any:
    """`module` with `code`, which must be there, replaced by `bug`. While it lasts, the copy can be launched."""
    source = Path(str(module.__file__)).read_text()
    assert code in source, f"{code!r} is not in {module.__name__}"
    path = directory / f"planted_{module.__name__.rpartition('.')[2]}.py"
    path.write_text(source.replace(code, bug))
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    copy = module_from_spec(spec)
    with patch.dict(sys.modules, {path.stem: copy}):
        spec.loader.exec_module(copy)
        yield copy
