"""The asyncio side of the engine: starts its process, hands it requests, and tells each caller what came of them.

Owns the process, the socket, tokenizing and detokenizing. Imports no torch. Only the thread of the event loop touches
its state; tokenizing of long prompts runs in a thread pool.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import zmq
import zmq.asyncio

from evenflow.config import EngineConfig, Settings
from evenflow.engine.generation import EngineObserver, Generation, Timing
from evenflow.engine.input import InputProcessor, Prompt, prompt_text
from evenflow.engine.messages import (
    AbortRequests,
    AddRequest,
    Failed,
    Hello,
    Phase,
    Ping,
    Pong,
    Ready,
    Start,
    StepOutput,
    Stop,
    ToEngine,
    ToFront,
    decode_for_front,
    encode,
)
from evenflow.engine.opening import OpenedModel
from evenflow.engine.output import OutputProcessor
from evenflow.engine.stats import EngineStats
from evenflow.request import Request, RequestDelta, RequestOutput
from evenflow.sampling_params import SamplingParams

logger = logging.getLogger("evenflow")

ENGINE_COMMAND = (sys.executable, "-m", "evenflow.engine.process")
IMPORT_DEADLINE_S = 180.0  # until the new process says its first word; most of it is the import of torch
SLOWEST_CPU_FLOPS = 5e10  # a second: so long may the largest step of a large model take before it counts as hung
STOP_TIMEOUT_S = 5.0  # between being asked to stop and being killed
# Threads of a CPU's parallel operations that spin long at each barrier take the cores that the front needs: with the
# demo model and 64 streams on 2 cores, 640 to 940 tokens/s with OpenMP's default, 740 to 1,060 with this.
BRIEF_SPINS = {"GOMP_SPINCOUNT": "1000"}
LONG_TEXT = 4096  # characters: beyond, tokenizing would hold the event loop for a millisecond


class EngineDeadError(RuntimeError):
    """The engine process ended, or does not answer. is_bad_input: for a cause that the user can mend."""

    def __init__(self, message: str, is_bad_input: bool = False) -> None:
        super().__init__(message)
        self.is_bad_input = is_bad_input


class EngineClient:
    """One engine in a process of its own. `start` it, `generate`, `close` it.

    engine_timeout_s: with work pending and no word from the engine for so long, it counts as hung, and is killed. On a
    CPU it is at least what the largest step of the model may take.
    engine_command: for tests that plant faults.
    """

    def __init__(
        self,
        config: EngineConfig,
        opened: OpenedModel,
        *,
        engine_timeout_s: float = 60.0,
        observer: EngineObserver | None = None,
        engine_command: Sequence[str] = ENGINE_COMMAND,
    ) -> None:
        self.config, self.opened = config, opened
        self.settings: Settings | None = None  # known when the engine is ready
        self.memory_account = self.kernel_account = ""
        self.error: EngineDeadError | None = None
        self.num_requests = 0  # sequences in the engine, and being tokenized for it
        self.num_prompt_tokens = 0  # of these; before tokenizing, at most as many
        self._engine_timeout_s, self._engine_command, self._observer = engine_timeout_s, engine_command, observer
        self._outputs = OutputProcessor(opened.tokenizer)
        self._generation_of: dict[str, Generation] = {}
        self._timings: dict[str, Timing] = {}  # by the engine's ids
        self._request_ids = map(str, count())
        self._pings: dict[int, asyncio.Future[Pong]] = {}
        self._ping_numbers = count()
        self._last_heard_s = 0.0
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="evenflow-tokenizer")
        self._tasks: list[asyncio.Task[None]] = []
        self._process: asyncio.subprocess.Process | None = None
        self._directory: str | None = None
        self._is_closing = False
        self._dead = asyncio.Event()

    async def start(self) -> None:
        """Returns when the engine is ready. Raises EngineDeadError with the cause; each phase has a deadline."""
        try:
            await self._spawn()
            ready = await self._await_ready()
        except BaseException:
            await self.close()
            raise
        self.settings = ready.settings
        self.memory_account, self.kernel_account = ready.memory_account, ready.kernel_account
        if ready.settings.device == "cpu":
            step_flops = 2 * ready.settings.max_num_batched_tokens * self.opened.model_config.num_parameters
            self._engine_timeout_s = max(self._engine_timeout_s, step_flops / SLOWEST_CPU_FLOPS)
        self._inputs = InputProcessor(
            ready.settings, self.opened.model_config, self.opened.tokenizer, self.opened.generation_config
        )
        self._tasks = [
            asyncio.create_task(self._receive_forever()),
            asyncio.create_task(self._watch_process()),
            asyncio.create_task(self._watch_heartbeat()),
        ]

    async def _spawn(self) -> None:
        # A directory of mode 0700: nobody else on this machine reaches the socket in it.
        self._directory = tempfile.mkdtemp(prefix="evenflow-")
        address = f"ipc://{self._directory}/engine"
        if len(address) > 100:  # a Unix socket's path has at most 107 bytes
            shutil.rmtree(self._directory)
            self._directory = tempfile.mkdtemp(prefix="evenflow-", dir="/tmp")
            address = f"ipc://{self._directory}/engine"
        self._context = zmq.asyncio.Context()
        self._to_engine = zmq.Context(self._context).socket(zmq.PUSH)
        self._from_engine = self._context.socket(zmq.PULL)
        self._to_engine.set_hwm(0)  # num_requests bounds it
        self._from_engine.set_hwm(0)
        self._to_engine.bind(address + "-in")
        self._from_engine.bind(address + "-out")
        self._process = await asyncio.create_subprocess_exec(
            *self._engine_command,
            address,
            str(os.getpid()),
            stdin=asyncio.subprocess.PIPE,  # held open: its end tells the engine that we are gone
            stdout=sys.stderr.fileno(),
            start_new_session=True,  # Ctrl-C is for us; we tell the engine
            env=BRIEF_SPINS | os.environ,
        )

    async def _await_ready(self) -> Ready:
        assert self._process is not None
        phase, deadline_s = "starting its process", IMPORT_DEADLINE_S
        ended = asyncio.ensure_future(self._process.wait())
        try:
            while True:
                message = asyncio.ensure_future(self._receive())
                await asyncio.wait((message, ended), timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
                if not message.done() and ended.done():
                    await asyncio.wait((message,), timeout=0.5)  # its last word may still be on the way
                if not message.done():
                    message.cancel()
                    if ended.done():
                        raise EngineDeadError(f"the engine process {how_it_ended(ended.result())} while {phase}")
                    raise await self._too_slow(f"{phase} took longer than {deadline_s:g} s")
                match message.result():
                    case Hello():
                        self._send(Start(self.config))
                    case Phase() as entered:
                        phase, deadline_s = entered.name, entered.deadline_s
                    case Ready() as ready:
                        return ready
                    case Failed() as failed:
                        raise EngineDeadError(failed.error, failed.is_bad_input)
        finally:
            ended.cancel()

    async def _too_slow(self, what: str) -> EngineDeadError:
        """Have the engine print its stacks before it is killed."""
        with contextlib.suppress(ProcessLookupError):
            assert self._process is not None
            self._process.send_signal(signal.SIGUSR1)
            await asyncio.sleep(0.5)
            self._process.kill()
        return EngineDeadError(f"the engine was stopped: {what} (where it stood is printed above)")

    async def _receive(self) -> ToFront:
        return decode_for_front(await self._from_engine.recv())

    def _send(self, message: ToEngine) -> None:
        with contextlib.suppress(zmq.Again):  # the engine is gone, as _watch_process will tell
            self._to_engine.send(encode(message), zmq.NOBLOCK)

    # Requests

    async def open(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        streaming: bool = False,
        cache_salt: str = "",
        add_special_tokens: bool = True,
    ) -> Generation:
        """Check all prompts, then queue all, each n times.

        streaming: outputs come as they grow and hold only what is new; otherwise one for each prompt, at its end.
        Raises ValueError that names what is wrong, before anything is queued, or EngineDeadError.
        """
        self.raise_if_dead()
        params = params.clone()  # the caller may go on changing theirs
        asked_s = time.perf_counter()
        num_requests, size = len(prompts) * params.n, sum(map(_prompt_size, prompts))
        self.num_requests += num_requests
        self.num_prompt_tokens += size
        try:
            ids = [next(self._request_ids) for _ in prompts]
            requests = await self.off_loop(
                sum(map(_prompt_size, prompts)),
                self._process_prompts,
                ids,
                prompts,
                params,
                cache_salt,
                add_special_tokens,
            )
            self.raise_if_dead()
        except BaseException:
            self.num_requests -= num_requests
            raise
        finally:
            self.num_prompt_tokens -= size
        lengths = [len(children[0].token_ids) for children in requests]
        self.num_prompt_tokens += sum(lengths)
        generation = Generation(self, ids, lengths, num_requests)
        for request_id, prompt, children in zip(ids, prompts, requests, strict=True):
            child_ids = [child.request_id for child in children]
            self._outputs.add(
                request_id, prompt_text(prompt), children[0].token_ids, params, child_ids, increments=streaming
            )
            self._generation_of[request_id] = generation
            for child in children:
                self._timings[child.request_id] = Timing(asked_s, generation)
                self._send(AddRequest.of(child))
        return generation

    def _process_prompts(
        self,
        ids: Sequence[str],
        prompts: Sequence[Prompt],
        params: SamplingParams,
        cache_salt: str,
        add_special_tokens: bool,
    ) -> list[list[Request]]:
        """Requests of every prompt. Runs in a thread when the prompts are long."""
        found = []
        for index, (request_id, prompt) in enumerate(zip(ids, prompts, strict=True)):
            try:
                found.append(
                    self._inputs.process(
                        request_id, prompt, params, cache_salt=cache_salt, add_special_tokens=add_special_tokens
                    )
                )
            except ValueError as error:
                raise ValueError(f"prompt {index}: {error}" if len(prompts) > 1 else str(error)) from None
        return found

    async def off_loop(self, size: int, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args), in a thread if `size` characters make it long."""
        if size < LONG_TEXT:
            return function(*args)
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, streaming: bool = True
    ) -> AsyncIterator[RequestOutput]:
        """Outputs of one prompt, each with what is new since the one before. Leaving the loop aborts."""
        generation = await self.open([prompt], params or self.opened.default_params, streaming=streaming)
        try:
            async for _, output in generation:
                yield output
        finally:
            generation.abort()

    def take(self, request_id: str) -> RequestOutput | None:
        return self._outputs.take(request_id)

    def forget(self, generation: Generation) -> None:
        """The end of a generation, whatever its state: nothing of it stays here or in the engine."""
        live = []
        for request_id in generation.request_ids:
            if self._generation_of.pop(request_id, None) is not None:
                live += self._outputs.abort(request_id)
        self.num_requests -= generation.num_requests
        self.num_prompt_tokens -= sum(generation.prompt_lengths)
        if live and self.error is None:
            self._abort(live)

    def _abort(self, child_ids: list[str]) -> None:
        """The engine says nothing more of these."""
        for child_id in child_ids:
            self._timings.pop(child_id, None)
        self._send(AbortRequests(child_ids))

    # The engine's words

    async def _receive_forever(self) -> None:
        try:
            while True:
                self._apply(await self._receive())
        except Exception as error:  # nothing would come any more, and nobody would know
            logger.exception("a message of the engine could not be used")
            self._die(EngineDeadError(f"a message of the engine could not be used: {type(error).__name__}"))

    def _apply(self, message: ToFront) -> None:
        self._last_heard_s = time.monotonic()
        match message:
            case StepOutput(deltas, stats, queue_times):
                self._observe(deltas, queue_times)
                touched, to_abort = self._outputs.apply(deltas)
                if to_abort:
                    self._abort(to_abort)
                for request_id in touched:
                    self._generation_of[request_id].touch(request_id)
                self._tell_stats(stats)
            case Pong(number, stats):
                if (future := self._pings.pop(number, None)) is not None and not future.done():
                    future.set_result(message)
                self._tell_stats(stats)
            case Failed(error, is_bad_input):
                self._die(EngineDeadError(error, is_bad_input))

    def _tell_stats(self, stats: EngineStats) -> None:
        if self._observer is not None:
            self._observer.engine_stats(stats)

    def _observe(self, deltas: Sequence[RequestDelta], queue_times: Sequence[tuple[str, float]]) -> None:
        """Time to first token, and between tokens. Rows that all stepped last time have one time in common."""
        now = time.perf_counter()
        for request_id, queue_s in queue_times:
            if (timing := self._timings.get(request_id)) is not None:
                timing.queue_s = queue_s
        counts: dict[float, int] = {}  # by the time of the token before; 0.0: there is none
        for delta in deltas:
            ended = delta.finish_reason is not None
            timing = self._timings.pop(delta.request_id, None) if ended else self._timings.get(delta.request_id)
            if timing is None or not delta.new_token_ids or self._observer is None:
                continue
            counts[timing.last_s] = counts.get(timing.last_s, 0) + len(delta.new_token_ids)
            if not timing.last_s:
                self._observer.first_token(now - timing.asked_s, timing.queue_s)
                if timing.generation.ttft_s is None:
                    timing.generation.ttft_s, timing.generation.queue_s = now - timing.asked_s, timing.queue_s
            timing.last_s = now
        for last_s, number in counts.items():
            assert self._observer is not None
            self._observer.tokens(number, now - last_s if last_s else None)

    async def ping(self, timeout_s: float, max_cells: int = 0) -> Pong | None:
        """The engine's answer, None if it gives none in time. A step must end before it can answer."""
        if self.error is not None or self.settings is None:
            return None
        number = next(self._ping_numbers)
        future: asyncio.Future[Pong] = asyncio.get_running_loop().create_future()
        self._pings[number] = future
        self._send(Ping(number, max_cells))
        try:
            return await asyncio.wait_for(future, timeout_s)
        except asyncio.TimeoutError:
            return None
        finally:
            self._pings.pop(number, None)

    async def is_ready(self) -> bool:
        """Busy: it stepped in the last engine_timeout_s. Idle: it answers within a second."""
        if self.error is not None or self.settings is None or self._is_closing:
            return False
        if self._generation_of:
            return time.monotonic() - self._last_heard_s < self._engine_timeout_s
        return await self.ping(timeout_s=1.0) is not None

    async def _watch_process(self) -> None:
        assert self._process is not None
        code = await self._process.wait()
        await asyncio.sleep(0.1)  # its last word may still be on the way
        if not self._is_closing:
            self._die(EngineDeadError(f"the engine process {how_it_ended(code)}"))

    async def _watch_heartbeat(self) -> None:
        """With work pending, the engine says something at every step."""
        is_pending_since = None
        while True:
            await asyncio.sleep(min(1.0, self._engine_timeout_s / 4))
            now = time.monotonic()
            if not self._generation_of:
                is_pending_since = None
                continue
            is_pending_since = now if is_pending_since is None else is_pending_since
            if now - max(self._last_heard_s, is_pending_since) > self._engine_timeout_s:
                error = await self._too_slow(f"it gave no sign of life for {self._engine_timeout_s:g} s")
                self._die(error)

    def _die(self, error: EngineDeadError) -> None:
        """The first cause counts. Everybody who waits is woken, and reads it."""
        if self.error is None:
            self.error = error
            self._dead.set()
            for generation in self._generation_of.values():
                generation.touch(None)

    def raise_if_dead(self) -> None:
        if self.error is not None:
            raise self.error
        if self.settings is None or self._is_closing:
            raise EngineDeadError("the engine is not running")

    async def wait_dead(self) -> EngineDeadError:
        """Returns when the engine has died, with the cause."""
        await self._dead.wait()
        assert self.error is not None
        return self.error

    async def close(self) -> None:
        """End the engine, and leave nothing behind: no process, no thread, no directory."""
        if self._is_closing:
            return
        self._is_closing = True
        for task in self._tasks:
            task.cancel()
        for generation in self._generation_of.values():
            generation.touch(None)
        if self._process is not None and self._process.returncode is None:
            self._send(Stop())
            try:
                await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT_S if self.settings else 0.0)
            except asyncio.TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
                await self._process.wait()
        if self._directory is not None:
            self._to_engine.close(linger=0)
            self._from_engine.close(linger=0)
            self._context.term()
            shutil.rmtree(self._directory, ignore_errors=True)
        self._threads.shutdown(wait=False, cancel_futures=True)


def _prompt_size(prompt: Prompt) -> int:
    """Characters or token ids."""
    content = next(iter(prompt.values()), "") if isinstance(prompt, dict) else prompt
    return len(content) if isinstance(content, (str, list)) else 0


def how_it_ended(code: int) -> str:
    """'ended with exit code 3', 'was killed by SIGKILL (out of memory?)'."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
