"""A runner as the engine sees it, of several ranks: it sends a plan to the others and runs its own share of it.

Their processes are in engine/ranks.py, their sums in distributed.py.
"""

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evenflow import distributed
from evenflow.config import Settings
from evenflow.distributed import TensorParallel
from evenflow.engine import worker
from evenflow.engine.rank_error import RankError
from evenflow.engine.rank_messages import (
    StartRank,
    encode_frame,
)
from evenflow.engine.ranks import WORKER_COMMAND, Deadlines, Ranks
from evenflow.engine.worker import digest_of, select_device
from evenflow.model_config import ModelConfig
from evenflow.request import StepPlan, StepResult, TokenMasks
from evenflow.runner.device_runner import DeviceRunner
from evenflow.runner.kv_cache import MemoryPlan
from evenflow.runner.making import make_runner
from evenflow.runner.model_runner import ModelRunner


def _end(at_end: list[Callable[[], None]], ranks: Ranks) -> None:
    for call in at_end:
        call()
    ranks.close()


class TensorParallelRunner:
    """A runner over settings.tensor_parallel_size ranks, of which rank 0 is in this process.

    on_failure: see Ranks. Raises ValueError for bad input, RankError when a rank fails. One at a time in a process.
    """

    def __init__(
        self,
        settings: Settings,
        model_config: ModelConfig,
        directory: Path,
        on_failure: Callable[[RankError], None] | None = None,
        command: Sequence[str] = WORKER_COMMAND,
        deadlines: Deadlines | None = None,
    ) -> None:
        self._deadlines = deadlines or Deadlines.of(settings, model_config)
        listener, address = distributed.listen("tcp://127.0.0.1:0")
        size = settings.tensor_parallel_size
        self.ranks = Ranks(size, self._deadlines, on_failure, command)
        self._at_end: list[Callable[[], None]] = []
        self._finalizer = weakref.finalize(self, _end, self._at_end, self.ranks)  # also when the interpreter ends
        try:
            self._device = device = select_device(settings.device, 0)
            rendezvous_s = self._deadlines.rendezvous_s
            with self.ranks.working("starting", rendezvous_s + self._deadlines.heartbeat_s):
                self.ranks.send(
                    lambda rank: encode_frame(
                        StartRank(rank, size, address, rendezvous_s, settings, model_config, str(directory))
                    )
                )
                check = self.ranks.raise_if_failed
                tp = distributed.join(0, size, address, device, deadline_s=rendezvous_s, listener=listener, check=check)
            self.ranks.group = tp.group
            self.rank_0 = self._load(settings, model_config, directory, tp)
            self._at_end.append(self.rank_0.close)
        except RankError as error:
            self.close()
            raise (ValueError(str(error)) if error.is_bad_input else error) from None
        except BaseException:
            self.close()
            raise
        finally:
            listener.close()
        self._digests: deque[tuple[int, int]] = deque([(0, 0)], maxlen=64)  # (step, checksum of all tokens up to it)

    def _load(
        self, settings: Settings, model: ModelConfig, directory: Path, tp: TensorParallel
    ) -> ModelRunner | DeviceRunner:
        with self.ranks.working("loading the weights", self._deadlines.loading_s):
            runner = make_runner(settings, model, directory, tp)
            self.ranks.wait_ready()
            return runner

    @property
    def memory(self) -> MemoryPlan:
        """Of each rank: what fits on all."""
        return self.rank_0.memory

    @property
    def max_in_flight(self) -> int:
        return self.rank_0.max_in_flight

    @property
    def kernel_account(self) -> str:
        return self.rank_0.kernel_account

    def launch(self, plan: StepPlan, masks: TokenMasks | None = None) -> tuple[int, Any]:
        """Send the plan to all ranks, and begin it here. Raises RankError when any rank has failed."""
        with self.ranks.working("computing a step", self._deadlines.step_s):
            number = self.ranks.send_step(plan, masks)
            return number, self.rank_0.launch(plan, masks)

    def collect(self, pending: tuple[int, Any]) -> StepResult:
        """Wait for a step. Raises RankError when any rank has failed."""
        number, launched = pending
        with self.ranks.working("computing a step", self._deadlines.step_s):
            result = self.rank_0.collect(launched)
        self._digests.append((number, digest_of(result, self._digests[-1][1])))
        return result

    def execute(self, plan: StepPlan, masks: TokenMasks | None = None) -> StepResult:
        return self.collect(self.launch(plan, masks))

    def check_ranks_agree(self) -> None:
        """Every rank has sampled the same tokens up to the last step that it waited for. Raises RankError.

        For tests, between two steps: it waits until the ranks have done what they were sent.
        """
        known = dict(self._digests)
        newest = self.ranks.step - worker.lag_of(self.rank_0)
        while min(pong.collected for pong in self.ranks.progress()) < newest:
            pass
        for rank, pong in enumerate(self.ranks.progress(), 1):
            if known[pong.collected] != pong.digest:
                raise RankError(f"tensor-parallel rank {rank} has sampled other tokens by step {pong.collected}")

    def close(self) -> None:
        """End the other ranks. Does nothing the second time."""
        self._finalizer()
