"""Talk with a model. Ctrl-C stops an answer, Ctrl-D or /exit ends, /reset forgets the conversation."""

import argparse
import io
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from evenflow.cli.generate import follow, open_llm, say
from evenflow.cli.options import add_engine_options, add_sampling_options, engine_config, explain, given

if TYPE_CHECKING:
    from evenflow.llm import LLM
    from evenflow.request import RequestOutput
    from evenflow.sampling_params import SamplingParams

EXAMPLES = """examples:
  evenflow chat
  evenflow chat --model Qwen/Qwen3-0.6B --system "Answer in one sentence."
  evenflow chat -p "tell me the tale of the wolf and the lamb" --temperature 0"""
COMMANDS = "/exit ends, /reset forgets the conversation, /help says this. Ctrl-C stops an answer."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--message", "-p", metavar="TEXT", help="say this, print the answer, and end")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument("--verbose", action="store_true", help="also say what the memory goes to")
    add_sampling_options(parser, leave_out=("n",))  # a conversation goes on with one answer
    add_engine_options(parser, leave_out=("seed",))  # --seed is the request's


def run(args: argparse.Namespace) -> int:
    if args.explain:
        return explain(engine_config(args), is_offline=True)
    config = engine_config(args)
    wanted = {"max_tokens": None, **given(args, "sampling_")}  # an answer may be as long as the context
    llm = open_llm(config.model, {k: v for k, v in given(args, "engine_").items() if k != "model"}, args.verbose)
    conversation = Conversation(llm, llm.default_sampling_params().replace(**wanted), args.system)
    if args.message is not None:
        return conversation.say(args.message)
    if sys.stdin.isatty():
        say(f"{config.model}: say something. {COMMANDS}")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a byte that is not UTF-8 spoils its line, not the rest
    while (text := read_line()) is not None:
        if text in ("/exit", "/quit"):
            break
        if text == "/reset":
            conversation.reset()
        elif text.startswith("/"):
            say(COMMANDS)
        elif text:
            try:
                conversation.say(text)
            except ValueError as error:
                say(f"evenflow: error: {error}")
    return 0


def read_line() -> str | None:
    """A line of the user, None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return ""


class Conversation:
    """The messages so far. What no longer fits the context is forgotten from its beginning, and said so."""

    def __init__(self, llm: "LLM", params: "SamplingParams", system: str | None) -> None:
        self.llm, self.params = llm, params
        self.system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = []

    def reset(self) -> None:
        self.messages = []

    def say(self, text: str) -> int:
        """Add the user's message, print the answer as it comes, remember both.

        Raises ValueError for what cannot be said, and then remembers what it did before.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": _checked(text)})
        answer = ""

        def remembered() -> Iterator["RequestOutput"]:
            nonlocal answer
            for output in self.llm.stream_chat(self.system + self.messages, self.params):
                answer = output.outputs[0].text
                yield output

        try:
            self._forget_what_does_not_fit()
            code = follow(remembered())
        except KeyboardInterrupt:
            print(" [stopped]", file=sys.stderr)
            code = 130
        except ValueError:
            self.messages = before
            raise
        self.messages.append({"role": "assistant", "content": answer})
        return code

    def _forget_what_does_not_fit(self) -> None:
        """Drop the oldest exchanges until at least a quarter of the context is left for the answer."""
        context = self.llm.settings.max_model_len
        limit, num_forgotten = context * 3 // 4, 0
        if self._num_tokens(self.messages[-1:]) >= context:
            return  # the last message alone leaves no room: it is refused, and that is no reason to forget
        while len(self.messages) > 2 and self._num_tokens(self.messages) > limit:
            del self.messages[:2]
            num_forgotten += 1
        if num_forgotten:
            say(f"[the {num_forgotten} oldest exchanges no longer fit the context and are forgotten]")

    def _num_tokens(self, messages: list[dict[str, str]]) -> int:
        """Of the prompt of these messages after the system's."""
        return len(self.llm.tokenizer.chat_prompt(self.system + messages).token_ids)


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the message is not valid UTF-8; say it again") from None
    return text
