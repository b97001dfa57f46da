"""Offline inference in the caller's process: LLM.generate, LLM.chat, LLM.beam_search. Names are vLLM's."""

import dataclasses
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import Any

import numpy as np

from evenflow.beam_search import BeamSearchOutput, beam_search
from evenflow.config import EngineConfig, Resolution
from evenflow.engine.building import build_engine
from evenflow.engine.input import InputProcessor, Prompt, prompt_text
from evenflow.engine.opening import open_model, resolve_settings
from evenflow.engine.output import OutputProcessor
from evenflow.garbage import only_new_objects
from evenflow.progress import GenerationProgress
from evenflow.request import FinishReason, Request, RequestDelta, RequestOutput
from evenflow.sampling_params import BeamSearchParams, SamplingParams
from evenflow.tokenizer import Tokenizer

Params = SamplingParams | Sequence[SamplingParams] | None
Message = dict[str, Any]
# vLLM's options that we have no use for: the values that ask for nothing, None where every value does.
VLLM_ONLY: dict[str, tuple[Any, ...] | None] = {
    "trust_remote_code": (None, False),
    "quantization": (None,),
    "enable_lora": (None, False),
    "tokenizer_mode": (None, "auto"),
    "cpu_offload_gb": (None, 0),
    "pipeline_parallel_size": (None, 1),
    "disable_log_stats": None,
    "swap_space": None,
}


class LLM:
    """A model with an engine around it. Keyword arguments are the fields of EngineConfig, see also `engine_options`.

    >>> llm = LLM("demo")
    >>> llm.generate("Once upon a time", SamplingParams(max_tokens=20))[0].outputs[0].text

    Raises ValueError that names the argument or the file at fault. Not thread-safe.
    """

    def __init__(self, model: str = "demo", **options: Any) -> None:
        self.config = EngineConfig(model=model, **engine_options(options))
        opened = open_model(self.config)
        self.resolution: Resolution = resolve_settings(self.config, opened.model_config, is_offline=True)
        self.model_config = opened.model_config
        built = build_engine(self.resolution.settings, opened)
        self.engine, self.settings = built.engine, built.settings
        self.memory_account, self.kernel_account = built.memory_account, built.kernel_account
        self._close_engine = built.close
        self._tokenizer = opened.tokenizer
        self._inputs = InputProcessor(self.settings, self.model_config, opened.tokenizer, opened.generation_config)
        self._outputs = OutputProcessor(opened.tokenizer)
        self._defaults = opened.default_params
        self._request_ids = map(str, count())
        self._kept: dict[str, list[RequestOutput]] = {}  # by request: what others' steps brought to it

    def default_sampling_params(self) -> SamplingParams:
        """What a request gets that names no parameters: the model's generation_config.json over our defaults.

        A copy: change it and pass it on.
        """
        return self._defaults.clone()

    get_default_sampling_params = default_sampling_params

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise ValueError("this LLM was made with skip_tokenizer_init=True; pass and read token ids")
        return self._tokenizer

    def get_tokenizer(self) -> Tokenizer:
        return self.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        lora_request: None = None,
        priority: None = None,
    ) -> list[RequestOutput]:
        """Complete prompts: texts, token ids, {"prompt": ...} or {"prompt_token_ids": ...}; one or a list of them.

        A dict with both keys: the ids count, the text is shown; with "cache_salt": blocks of the prefix cache are
        shared within the same salt only. sampling_params: one for all, or one per prompt. Returns one RequestOutput
        per prompt, in their order. All prompts, and the grammars of structured outputs, are checked before any is
        run: ValueError. use_tqdm: show a progress bar for several prompts. lora_request and priority are vLLM's, and
        must be None.
        """
        refuse(lora_request=lora_request, priority=priority)
        prompt_list = as_prompts(prompts)
        return self._run(prompt_list, self._params_of(prompt_list, sampling_params), use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        lora_request: None = None,
        chat_template: None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or a list of them. A message is {"role": ..., "content": ...}.

        continue_final_message: go on with the last message; needs add_generation_prompt=False. tools: OpenAI's list,
        shown to the model. chat_template_kwargs: further variables of the model's template, such as enable_thinking.
        chat_template and lora_request are vLLM's, and must be None. RequestOutput.prompt is the rendered text.
        """
        refuse(chat_template=chat_template, lora_request=lora_request)
        prompts = [
            self._chat_prompt(messages, add_generation_prompt, tools, continue_final_message, chat_template_kwargs)
            for messages in as_conversations(messages)
        ]
        return self.generate(prompts, sampling_params, use_tqdm)

    def _chat_prompt(self, messages: Sequence[Message], *options: Any) -> Prompt:
        text, token_ids = self.tokenizer.chat_prompt(messages, *options)
        return {"prompt": text, "prompt_token_ids": token_ids}

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Complete one prompt; yields after every step that brought tokens, with everything so far.

        Leaving the loop early aborts the request. Within the loop other calls may be made, other streams too: each
        step is everybody's.
        """
        requests = self._add([prompt], [sampling_params or self._defaults], streaming=True)
        try:
            while self._outputs.is_live(requests[0]) or requests[0] in self._kept:
                yield from self._kept.pop(requests[0], None) or self._step(requests)
        finally:
            self._abort(requests)

    def stream_chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Iterator[RequestOutput]:
        """As `stream`, for one conversation, with the arguments of `chat`."""
        prompt = self._chat_prompt(messages, add_generation_prompt, tools, continue_final_message, chat_template_kwargs)
        return self.stream(prompt, sampling_params)

    def beam_search(self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams) -> list[BeamSearchOutput]:
        """The params.beam_width best continuations of every prompt, best first."""
        params = dataclasses.replace(params)  # checked again
        checked = [
            self._inputs.process("beam", prompt, SamplingParams(max_tokens=1))[0].token_ids
            for prompt in as_prompts(prompts)
        ]
        num_candidates = min(2 * params.beam_width, self.model_config.vocab_size)
        outputs = beam_search(
            checked,
            params,
            self._inputs.eos_token_ids,
            lambda sequences: self._next_tokens(sequences, num_candidates),
            self.settings.max_model_len,
        )
        if self._tokenizer is not None:
            for output in outputs:
                output.sequences = [
                    dataclasses.replace(sequence, text=self._tokenizer.decode(sequence.token_ids))
                    for sequence in output.sequences
                ]
        return outputs

    def close(self) -> None:
        """End whatever still runs, and the processes of other ranks. The memory goes with the object."""
        self._abort(self._outputs.live_ids())
        self._close_engine()

    def _params_of(self, prompts: Sequence[Prompt], params: Params) -> list[SamplingParams]:
        if params is None:
            return [self._defaults] * len(prompts)
        if isinstance(params, SamplingParams):
            return [params] * len(prompts)
        if not isinstance(params, Sequence) or len(params) != len(prompts):
            raise ValueError(
                f"sampling_params must be one SamplingParams, or one for each of the {len(prompts)} prompts in a list"
            )
        return list(params)

    def _add(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], *, streaming: bool = False
    ) -> list[str]:
        """Check all, then queue all. Returns the requests' ids."""
        parents: list[tuple[str, list[Request]]] = []
        structures: set[int] = set()  # ids of those that are compiled
        for index, (prompt, prompt_params) in enumerate(zip(prompts, params, strict=True)):
            request_id = next(self._request_ids)
            try:
                children = self._inputs.process(request_id, prompt, prompt_params)
                structure = id(prompt_params.structured_outputs)
                if structure not in structures:
                    self.engine.check_grammar(children[0])
                    structures.add(structure)
                parents.append((request_id, children))
            except ValueError as error:
                raise ValueError(f"prompt {index}: {error}" if len(prompts) > 1 else str(error)) from None
        for (request_id, children), prompt, prompt_params in zip(parents, prompts, params, strict=True):
            ids = [child.request_id for child in children]
            # A copy in either case: the caller may go on changing theirs.
            own_params = children[0].params if prompt_params.n == 1 else prompt_params.clone()
            self._outputs.add(
                request_id, prompt_text(prompt), list(children[0].token_ids), own_params, ids, streaming=streaming
            )
            for child in children:
                self.engine.add(child)
        return [request_id for request_id, _ in parents]

    def _step(self, own: Container[str]) -> list[RequestOutput]:
        """A step for everybody. Returns what it brought to `own` requests; for others that is kept until they ask."""
        with self._stepping():
            return self._take(self.engine.step(), own)

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        """What a step brought is lost if it is interrupted: then nobody may wait for it."""
        try:
            yield
        except BaseException:
            self._abort(self._outputs.live_ids())
            raise

    def _take(self, deltas: Sequence[RequestDelta], own: Container[str]) -> list[RequestOutput]:
        outputs, to_abort = self._outputs.process(deltas)
        self.engine.abort(to_abort)
        taken = []
        for output in outputs:
            if output.request_id in own:
                taken.append(output)
            else:
                self._kept.setdefault(output.request_id, []).append(output)
        return taken

    def _abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._kept.pop(request_id, None)
            self.engine.abort(self._outputs.abort(request_id))

    @only_new_objects()
    def _run(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], show_progress: bool
    ) -> list[RequestOutput]:
        """Run to the end. Whatever interrupts it, nothing of these requests stays behind."""
        request_ids = self._add(prompts, params)
        own = set(request_ids)
        finished: dict[str, RequestOutput] = {}
        try:
            with GenerationProgress(len(prompts)) if show_progress and len(prompts) > 1 else nullcontext() as progress:
                while len(finished) < len(request_ids):
                    for output in self._step(own):
                        finished[output.request_id] = output
                        if progress is not None:
                            progress.count(output)
        finally:
            self._abort(request_ids)
        return [finished[request_id] for request_id in request_ids]

    def _next_tokens(self, sequences: Sequence[list[int]], num_candidates: int) -> list[list[tuple[int, float]]]:
        """The best next tokens of every sequence. Goes to the engine itself: max_logprobs bounds users, not us."""
        params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=num_candidates, seed=0, detokenize=False)
        requests = [Request(next(self._request_ids), list(token_ids), params, max_tokens=1) for token_ids in sequences]
        for request in requests:
            self.engine.add(request)
        own = {request.request_id for request in requests}
        found: dict[str, list[tuple[int, float]]] = {}
        try:
            while len(found) < len(requests):
                with self._stepping():
                    deltas = self.engine.step()
                    self._take(
                        [delta for delta in deltas if delta.request_id not in own], ()
                    )  # of streams that are open
                for delta in deltas:
                    if delta.request_id not in own:
                        continue
                    if delta.finish_reason is FinishReason.ERROR:
                        raise RuntimeError(f"beam search failed: {delta.error}")
                    assert delta.logprobs is not None
                    entry = delta.logprobs[0]
                    found[delta.request_id] = list(zip(entry.token_ids[1:], entry.logprobs[1:], strict=True))
        finally:
            self.engine.abort(own)
        return [found[request.request_id] for request in requests]


def as_conversations(messages: Any) -> list[Sequence[Message]]:
    """One conversation, one message, or a list of conversations -> a list of conversations."""
    if isinstance(messages, dict):
        return [[messages]]
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError("messages must be a list of at least one {'role': ..., 'content': ...}, or several such lists")
    return [messages] if isinstance(messages[0], dict) else list(messages)


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or a list of prompts -> a list. Integers in a row are one prompt."""
    if isinstance(prompts, (str, dict)):
        return [prompts]
    if not isinstance(prompts, (list, tuple, np.ndarray)):
        raise ValueError(
            "prompts must be a string, token ids, {'prompt': ...} or {'prompt_token_ids': ...}, or a list of them, "
            f"not {type(prompts).__name__}"
        )
    prompt_list: list[Any] = list(prompts)
    is_one = bool(prompt_list) and isinstance(prompt_list[0], (int, np.integer))
    return [prompts] if is_one else prompt_list


def engine_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options in vLLM's terms -> fields of EngineConfig. Raises ValueError for what neither has, or asks too much.

    What changes nothing here is left out (disable_log_stats, swap_space, quantization=None); enforce_eager=True turns
    graphs off; dtype and generation_config take vLLM's names of ours.
    """
    ours = {name: value for name, value in options.items() if name not in (*VLLM_ONLY, "enforce_eager")}
    known = {field.name for field in dataclasses.fields(EngineConfig)}
    if unknown := sorted(ours.keys() - known):
        raise ValueError(f"LLM has no option {unknown[0]!r}; its options are {', '.join(sorted(known))}")
    for name, harmless in VLLM_ONLY.items():
        if harmless is not None and options.get(name) not in harmless:
            raise ValueError(f"{name}={options[name]!r} is not implemented; leave {name} out")
    if options.get("enforce_eager"):
        if ours.get("enable_graphs"):
            raise ValueError("enforce_eager=True and enable_graphs=True contradict each other; keep one of them")
        ours["enable_graphs"] = False
    if "dtype" in ours:
        dtype = str(ours["dtype"]).removeprefix("torch.")
        ours["dtype"] = {"half": "float16", "float": "float32"}.get(dtype, dtype)
    if ours.get("generation_config") == "vllm":
        ours["generation_config"] = "none"
    return ours


def refuse(**options: object) -> None:
    """Arguments of vLLM's that can only be None here. Raises ValueError that names the one which is not."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} is not implemented; leave it out")
