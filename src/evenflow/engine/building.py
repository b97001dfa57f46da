"""A model's weights, its cache, its scheduler: everything that steps, put together. Imports torch."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from evenflow.config import Settings
from evenflow.engine.engine import Engine
from evenflow.engine.input import eos_token_ids
from evenflow.engine.opening import OpenedModel
from evenflow.engine.rank_error import RankError
from evenflow.engine.tensor_parallel import TensorParallelRunner
from evenflow.guided.matcher import GuidedDecoding
from evenflow.runner.device_runner import DeviceRunner
from evenflow.runner.making import make_runner
from evenflow.runner.model_runner import ModelRunner
from evenflow.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine that can step. settings: with the context that the cache can hold.

    memory_account: one line. kernel_account: one about the check of a device's kernels, "" on a CPU. close: ends the
    processes of other ranks, where there are any.
    """

    engine: Engine
    settings: Settings
    memory_account: str
    kernel_account: str
    close: Callable[[], None]


def build_engine(
    settings: Settings, opened: OpenedModel, on_rank_failure: Callable[[RankError], None] | None = None
) -> BuiltEngine:
    """Load the weights and make the cache. Raises ValueError that names the file or the setting at fault.

    on_rank_failure: told, by another thread, when a tensor-parallel rank has failed at whatever time; RankError is also
    raised by the step, or the loading, that it befell.
    """
    runner: ModelRunner | DeviceRunner | TensorParallelRunner
    close: Callable[[], None] = lambda: None  # noqa: E731
    if settings.tensor_parallel_size == 1:
        runner = make_runner(settings, opened.model_config, opened.directory)
    else:
        runner = TensorParallelRunner(settings, opened.model_config, opened.directory, on_rank_failure)
        close = runner.close
    settings = dataclasses.replace(settings, max_model_len=runner.memory.max_model_len)
    scheduler = Scheduler(
        num_blocks=runner.memory.num_blocks,
        block_size=settings.block_size,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=settings.max_model_len,
        enable_prefix_caching=settings.enable_prefix_caching,
        enable_chunked_prefill=settings.enable_chunked_prefill,
    )
    model, tokenizer = opened.model_config, opened.tokenizer
    guided = None
    if tokenizer is not None:
        eos_ids = eos_token_ids(model, tokenizer, opened.generation_config)
        guided = GuidedDecoding(tokenizer, model.vocab_size, eos_ids)
    return BuiltEngine(Engine(scheduler, runner, guided), settings, str(runner.memory), runner.kernel_account, close)
