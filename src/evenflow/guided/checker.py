"""Checks grammars where they can do no harm: in a process that is killed when one takes too long or too much.

The server asks before it queues a request, so that neither its event loop nor the engine compiles anything unseen.
"""

import contextlib
import json
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from select import select

from evenflow.guided.grammar import refusal, to_grammar
from evenflow.sampling_params import StructuredOutputsParams

TIMEOUT_S = 2.0
START_TIMEOUT_S = 30.0
KNOWN_BYTES = 4 * 2**20  # of grammars that were found good


class GrammarChecker:
    """`check` from any thread; `close` it. The process is started when it is first needed.

    vocab_size: the width of the logits. special_tokens: their names by id, which a grammar may use.
    """

    def __init__(self, vocab_size: int, special_tokens: dict[int, str], timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._vocabulary = (max(vocab_size, 256 + len(special_tokens)), special_tokens, min(special_tokens, default=0))
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._known: OrderedDict[str, None] = OrderedDict()
        self._num_known_bytes = 0

    def check(
        self,
        params: StructuredOutputsParams,
        name: str = "structured_outputs",
        parts: Callable[[], Sequence[tuple[str, StructuredOutputsParams]]] = tuple,
    ) -> None:
        """Raises ValueError that says what is wrong with it. Takes at most timeout_s once the process runs.

        name: of the field that it came from. parts: what it is made of, by field: the first bad one is told instead.
        """
        grammar = to_grammar(params)
        with self._lock:
            if grammar in self._known:
                self._known.move_to_end(grammar)
                return
            if error := self._ask(grammar):
                # Of a process that survived the whole, so the parts are quick.
                for part_name, part in parts() if self._process is not None else ():
                    if part_error := self._ask(to_grammar(part)):
                        raise ValueError(f"{part_name}: {refusal(part, part_error)}")
                raise ValueError(f"{name}: {refusal(params, error)}")
            self._remember(grammar)

    def _ask(self, grammar: str) -> str:
        process = self._running()
        self._write(process, grammar)
        answer = self._read(process, self._timeout_s)
        if answer is not None:
            return str(json.loads(answer))
        code = process.poll()
        self._stop()
        return f"it takes longer than {self._timeout_s:g} s" if code is None else "it takes too much memory"

    def _running(self) -> "subprocess.Popen[bytes]":
        """The process, which has answered once, so that its start does not count against a grammar."""
        if self._process is not None and self._process.poll() is not None:
            self._stop()
        if self._process is None:
            self._process = subprocess.Popen(
                (sys.executable, "-m", "evenflow.guided.worker"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            self._write(self._process, self._vocabulary)
            self._write(self._process, to_grammar(StructuredOutputsParams(choice=["x"])))
            if self._read(self._process, START_TIMEOUT_S) is None:
                self._stop()
                raise ValueError("structured_outputs: the process that checks grammars does not start")
        return self._process

    @staticmethod
    def _write(process: "subprocess.Popen[bytes]", value: object) -> None:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died since, as the missing answer will tell
            process.stdin.write(json.dumps(value).encode() + b"\n")
            process.stdin.flush()

    @staticmethod
    def _read(process: "subprocess.Popen[bytes]", timeout_s: float) -> bytes | None:
        """One line; None if it does not come in time, or the process has ended."""
        assert process.stdout is not None
        ready, _, _ = select([process.stdout], [], [], timeout_s)
        return process.stdout.readline() or None if ready else None

    def _remember(self, grammar: str) -> None:
        self._known[grammar] = None
        self._num_known_bytes += len(grammar)
        while self._num_known_bytes > KNOWN_BYTES:
            self._num_known_bytes -= len(self._known.popitem(last=False)[0])

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # what was not written
                    pipe.close()
        self._process = None

    def close(self) -> None:
        with self._lock:
            self._stop()
