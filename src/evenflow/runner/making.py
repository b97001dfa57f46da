"""Which runner computes a model: the CPU's or a device's."""

from pathlib import Path

from evenflow.config import Settings
from evenflow.distributed import TensorParallel
from evenflow.model_config import ModelConfig
from evenflow.runner.device_runner import DeviceRunner
from evenflow.runner.model_runner import ModelRunner


def make_runner(
    settings: Settings, model_config: ModelConfig, directory: Path, tp: TensorParallel | None = None
) -> ModelRunner | DeviceRunner:
    """The runner of one rank, by settings.device. Raises as its constructor does."""
    runner_type = ModelRunner if settings.device == "cpu" else DeviceRunner
    return runner_type(settings, model_config, directory, tp)
