"""RequestDelta -> RequestOutput: the front's state of every live request.

Owns detokenizing, stop strings, log-probability dicts, and the merging of a request's `n` children. The engine does not
know stop strings: what ends here is named in the list of ids to abort.
"""

import logging
from bisect import bisect_left
from collections.abc import Sequence

from evenflow.detokenizer import Detokenizer, StopChecker
from evenflow.request import CompletionOutput, FinishReason, Logprob, RequestDelta, RequestOutput, TokenLogprobs
from evenflow.sampling_params import SamplingParams
from evenflow.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class OutputProcessor:
    """Turns what the engine sends into what the caller reads. `tokenizer` None: texts stay empty. Not thread-safe."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._parents: dict[str, _Parent] = {}
        self._children: dict[str, _Child] = {}

    def add(
        self,
        parent_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        child_ids: Sequence[str],
        *,
        streaming: bool = False,
        increments: bool = False,
    ) -> None:
        """Announce a request before it is handed to the engine. child_ids: the engine's ids, by completion index.

        By default there is one RequestOutput, when all children have ended. With `streaming` there is one for every
        step that brought tokens, with everything so far. With `increments` these hold only what is new: the new text,
        token ids and log-probabilities of the completions that moved (cumulative_logprob stays a sum), and the
        prompt's log-probabilities once. A last output has `finished`.
        """
        if parent_id in self._parents or any(child_id in self._children for child_id in child_ids):
            raise ValueError(f"request id {parent_id!r} is already in use; wait for its end, or choose another")
        parent = _Parent(parent_id, prompt, prompt_token_ids, params, self._tokenizer, streaming, increments)
        for index, child_id in enumerate(child_ids):
            child = _Child(index, child_id, parent)
            parent.children.append(child)
            self._children[child_id] = child
        self._parents[parent_id] = parent

    def process(self, deltas: Sequence[RequestDelta]) -> tuple[list[RequestOutput], list[str]]:
        """Apply one step's deltas. Returns the outputs and the ids of children that the engine must abort."""
        touched, to_abort = self.apply(deltas)
        return [output for parent_id in touched if (output := self.take(parent_id)) is not None], to_abort

    def apply(self, deltas: Sequence[RequestDelta]) -> tuple[list[str], list[str]]:
        """Take over deltas. Returns the ids of the requests that have something to `take`, and of children to abort.

        What is not taken at once is merged with what comes later. Deltas of children that are unknown, ended or
        aborted are ignored.
        """
        touched: dict[str, _Parent] = {}
        to_abort = []
        for delta in deltas:
            child = self._children.get(delta.request_id)
            if child is None:
                continue
            try:
                child.apply(delta)
            except Exception:  # one request's text must not end the others
                logger.exception("request %s: its output could not be processed", delta.request_id)
                child.fail("the output of this request could not be turned into text")
            if child.finish_reason is not None:
                del self._children[delta.request_id]
                if delta.finish_reason is None:
                    to_abort.append(delta.request_id)
            touched[child.parent.request_id] = child.parent
        return [parent_id for parent_id, parent in touched.items() if parent.has_news], to_abort

    def take(self, parent_id: str) -> RequestOutput | None:
        """What there is to tell of a request, None if nothing. After the last output the request is forgotten."""
        parent = self._parents.get(parent_id)
        if parent is None or not parent.has_news:
            return None
        if parent.is_finished:
            del self._parents[parent_id]
        return parent.output()

    def abort(self, parent_id: str) -> list[str]:
        """Forget a request; harmless if unknown. Returns the ids of its live children, for the engine to abort."""
        parent = self._parents.pop(parent_id, None)
        if parent is None:
            return []
        live = [child.child_id for child in parent.children if child.finish_reason is None]
        for child_id in live:
            del self._children[child_id]
        return live

    def is_live(self, parent_id: str) -> bool:
        return parent_id in self._parents

    def live_ids(self) -> list[str]:
        return list(self._parents)


class _Parent:
    """One request of the caller."""

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        streaming: bool,
        increments: bool,
    ) -> None:
        self.request_id, self.prompt, self.prompt_token_ids = request_id, prompt, prompt_token_ids
        self.params, self.tokenizer = params, tokenizer
        self.is_streaming, self.is_incremental = streaming or increments, increments
        self.children: list[_Child] = []
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[dict[int, Logprob] | None] = [None]
        self._num_prompt_logprobs_sent = 0

    @property
    def is_finished(self) -> bool:
        return all(child.finish_reason is not None for child in self.children)

    @property
    def has_news(self) -> bool:
        return self.is_finished or (self.is_streaming and any(child.is_changed for child in self.children))

    def output(self) -> RequestOutput:
        """What there is to tell now."""
        finished = self.is_finished
        told = [child for child in self.children if child.is_changed] if self.is_incremental else self.children
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[child.output(self.is_incremental) for child in told],
            finished=finished,
            prompt_logprobs=self._take_prompt_logprobs(finished),
            num_cached_tokens=self.num_cached_tokens,
        )

    def add_prompt_logprobs(self, entries: Sequence[TokenLogprobs]) -> None:
        room = len(self.prompt_token_ids) - len(self.prompt_logprobs)
        self.prompt_logprobs += [logprob_dict(entry, self.tokenizer) for entry in entries[: max(0, room)]]

    def _take_prompt_logprobs(self, finished: bool) -> list[dict[int, Logprob] | None] | None:
        """All of them as soon as they are complete; at the end whatever there is."""
        is_complete = len(self.prompt_logprobs) == len(self.prompt_token_ids)
        if self.params.prompt_logprobs is None or not (is_complete or finished):
            return None
        if self.is_incremental and self._num_prompt_logprobs_sent:
            return None
        self._num_prompt_logprobs_sent = len(self.prompt_logprobs)
        return self.prompt_logprobs


class _Child:
    """One completion. With stop strings, `_text_ends[i]` counts the characters after token i, to find where to cut."""

    def __init__(self, index: int, child_id: str, parent: _Parent) -> None:
        self.index, self.child_id, self.parent = index, child_id, parent
        self.finish_reason: FinishReason | None = None
        self.is_changed = False
        self._stop_reason: int | str | None = None
        self._error: str | None = None
        self._token_ids: list[int] = []
        self._pieces: list[str] = []
        self._logprobs: list[dict[int, Logprob]] = []
        self._num_told = 0  # tokens
        self._cumulative_logprob = 0.0  # of the tokens told
        self._text_ends: list[int] = []
        self._detokenizer: Detokenizer | None = None
        self._checker: StopChecker | None = None
        params = parent.params
        if parent.tokenizer is not None and params.detokenize:
            self._detokenizer = Detokenizer(parent.tokenizer, parent.prompt_token_ids, params.skip_special_tokens)
            if params.stop:
                self._checker = StopChecker(params.stop, params.include_stop_str_in_output)

    def apply(self, delta: RequestDelta) -> None:
        """Take over one delta; sets finish_reason where it, or a stop string, ends the completion."""
        parent, params, finish_reason = self.parent, self.parent.params, delta.finish_reason
        parent.num_cached_tokens = max(parent.num_cached_tokens, delta.num_cached_tokens)
        if delta.prompt_logprobs and self.index == 0:
            parent.add_prompt_logprobs(delta.prompt_logprobs)
        new_ids = delta.new_token_ids
        self.is_changed = self.is_changed or bool(new_ids) or finish_reason is not None
        self._token_ids += new_ids
        if delta.logprobs and params.logprobs is not None:
            self._logprobs += [logprob_dict(entry, parent.tokenizer) for entry in delta.logprobs]
        has_stop_token = finish_reason is FinishReason.STOP and not delta.is_grammar_end
        if has_stop_token and not params.include_stop_str_in_output:
            new_ids = new_ids[:-1]  # the stop token itself is no text
        if self._detokenizer is not None:
            self._add_text(self._detokenizer, new_ids, is_last=finish_reason is not None)
        if self._checker is not None and self._checker.match is not None:
            self._cut(self._checker.match.stop)
        elif delta.error is not None:
            self.fail(delta.error)
        elif finish_reason is not None:
            self.finish_reason, self._stop_reason = finish_reason, delta.stop_reason

    def fail(self, error: str) -> None:
        self.finish_reason, self._error, self.is_changed = FinishReason.ERROR, error, True

    def _add_text(self, detokenizer: Detokenizer, new_ids: list[int], is_last: bool) -> None:
        checker = self._checker
        if checker is None:
            text = detokenizer.append(new_ids)
            self._pieces.append(text + detokenizer.flush() if is_last else text)
            return
        for token_id in new_ids:
            self._check(checker, detokenizer.append([token_id]), is_new_token=True)
            if checker.match is not None:
                return
        if is_last:
            self._check(checker, detokenizer.flush(), is_new_token=False)
            self._pieces.append(checker.flush())

    def _check(self, checker: StopChecker, text: str, is_new_token: bool) -> None:
        ends = self._text_ends
        if is_new_token:
            ends.append(ends[-1] if ends else 0)
        if ends:
            ends[-1] += len(text)
        self._pieces.append(checker.append(text, counts=len(ends) > self.parent.params.min_tokens))

    def _cut(self, stop: str) -> None:
        """Drop the tokens after the one that completed the stop string."""
        count = self._num_final_tokens()
        del self._token_ids[count:], self._logprobs[count:]
        self.finish_reason, self._stop_reason = FinishReason.STOP, stop

    def _num_final_tokens(self) -> int:
        """Tokens that no stop string can cut off any more."""
        if self._checker is None or self._checker.pending is None:
            return len(self._token_ids)
        return bisect_left(self._text_ends, self._checker.pending.end) + 1

    def output(self, is_incremental: bool) -> CompletionOutput:
        """Everything so far, or what is new since the last call."""
        self.is_changed = False
        end, text = self._num_final_tokens(), "".join(self._pieces)
        start = self._num_told if is_incremental else 0
        has_logprobs = self.parent.params.logprobs is not None
        if has_logprobs:
            told = range(self._num_told, min(end, len(self._logprobs)))
            self._cumulative_logprob += sum(next(iter(self._logprobs[i].values())).logprob for i in told)
        self._num_told = max(end, self._num_told)
        self._pieces = [] if is_incremental else [text]
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=self._token_ids[start:end],
            cumulative_logprob=self._cumulative_logprob if has_logprobs else None,
            logprobs=self._logprobs[start:end] if has_logprobs else None,
            finish_reason=None if self.finish_reason is None else self.finish_reason.value,
            stop_reason=self._stop_reason,
            error=self._error,
        )


def logprob_dict(entry: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """Token id -> Logprob: first the token that stands there, then the best ones with ranks 1, 2, ..."""
    result = {}
    for rank, (token_id, logprob) in enumerate(zip(entry.token_ids, entry.logprobs, strict=True)):
        text = None if tokenizer is None else tokenizer.token_text(token_id)
        if token_id not in result:
            result[token_id] = Logprob(logprob, rank or entry.rank, text)
    return result
