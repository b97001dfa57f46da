"""Evenflow: high-throughput LLM inference from one code base: on NVIDIA GPUs, on AMD GPUs, and on a CPU.

Public names are imported when they are first used, so that `import evenflow` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evenflow.config import EngineConfig as EngineConfig
    from evenflow.engine.client import EngineClient as EngineClient
    from evenflow.llm import LLM as LLM
    from evenflow.request import CompletionOutput as CompletionOutput
    from evenflow.request import RequestOutput as RequestOutput
    from evenflow.sampling_params import BeamSearchParams as BeamSearchParams
    from evenflow.sampling_params import SamplingParams as SamplingParams
    from evenflow.sampling_params import StructuredOutputsParams as StructuredOutputsParams

__version__ = "0.1.0"

_PUBLIC = {
    "LLM": "evenflow.llm",
    "EngineConfig": "evenflow.config",
    "EngineClient": "evenflow.engine.client",
    "SamplingParams": "evenflow.sampling_params",
    "BeamSearchParams": "evenflow.sampling_params",
    "StructuredOutputsParams": "evenflow.sampling_params",
    "RequestOutput": "evenflow.request",
    "CompletionOutput": "evenflow.request",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'evenflow' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
