"""The built-in demo model: a small LLaMA that knows five old books of tales.

Owns the shipped weights (`model/`), the text they were learnt from (`tales/`) and the script that makes the former from
the latter (`train.py`). The engine loads the model like any other checkpoint; nothing here is needed to run it.
"""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).resolve().parent / "model"
TALES_DIR: Path = Path(__file__).resolve().parent / "tales"
