"""A model's chat template: messages -> prompt text, in Jinja's immutable sandbox.

Owns the environment (as in Hugging Face transformers, for which templates are written) and the check of the messages.
Knows no token ids. A template comes from the model's directory, never from a request.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

Message = dict[str, Any]

# Appended to the message that is to be continued, then looked for in the rendered text. The space at the end tells
# whether the template trims the message.
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_ARGUMENTS = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "self")


class ChatTemplate:
    """One template, compiled at its first use. `variables` are the special tokens by name (bos_token, ...)."""

    def __init__(self, source: str, variables: dict[str, str]) -> None:
        self.source = source
        self._variables = variables

    @cached_property
    def _template(self) -> jinja2.Template:
        environment = _environment()
        self._reserved = {*_ARGUMENTS, *environment.globals, *self._variables}
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the model's chat template does not compile: {error}") from None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: list[dict[str, Any]] | None,
        continue_final_message: bool,
        options: Mapping[str, Any],
    ) -> str:
        """The prompt text. Raises ValueError with the template's own message, or naming the field that is wrong.

        A template that knows no role `developer` is shown `system`, the role's older name.
        """
        template, checked = self._template, check_messages(messages)
        self._check_options(options)
        if tools is not None and not (isinstance(tools, (list, tuple)) and all(isinstance(t, dict) for t in tools)):
            raise ValueError("tools must be a list of {'type': 'function', 'function': {...}}")
        if "developer" not in self.source:
            checked = [m | {"role": "system"} if m["role"] == "developer" else m for m in checked]
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message=True needs add_generation_prompt=False")
        final = _tag_final(checked) if continue_final_message else ""
        variables: dict[str, Any] = {**self._variables, **options, "messages": checked, "tools": tools or None}
        try:
            text = template.render(variables, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template can raise anything that an expression can
            message = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"messages: the model's chat template refused them: {message}") from None
        return _cut_at_tag(text, final) if continue_final_message else text

    def _check_options(self, options: object) -> None:
        name = "chat_template_kwargs"
        if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
            raise ValueError(f"{name} must be a dict whose keys are names of the chat template's variables")
        if taken := sorted(options.keys() & self._reserved):
            raise ValueError(f"{name} has {taken[0]!r}, which is set otherwise and cannot be given there")


def check_messages(messages: Sequence[Message]) -> list[Message]:
    """Copies of the messages as templates expect them; checked ones stay as they are.

    Every content is one string, every tool call's arguments are an object, where OpenAI's clients send its JSON text.
    Keys whose value is None are left out; an assistant without content or tool calls has said nothing. Raises
    ValueError that names the message and the part which cannot be used.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError("messages must be a list of at least one {'role': ..., 'content': ...}")
    return [_check_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _check_message(name: str, message: object) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"{name} must be a dict with role and content, not {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f"{name}.role={role!r:.80} must be a string such as 'user'")
    checked = {str(key): value for key, value in message.items() if value is not None}
    if "content" in checked:
        checked["content"] = _check_content(f"{name}.content", checked["content"])
    elif role == "assistant" and not checked.get("tool_calls"):
        checked["content"] = ""
    elif not checked.get("tool_calls"):
        raise ValueError(f"{name} has no content; pass a string, or a list of text parts")
    if checked.get("tool_calls"):
        checked["tool_calls"] = _check_calls(f"{name}.tool_calls", checked["tool_calls"])
    return checked


def _check_calls(name: str, calls: object) -> list[dict[str, Any]]:
    if not isinstance(calls, (list, tuple)):
        raise ValueError(f"{name} must be a list")
    return [_check_call(f"{name}[{i}].function", call) for i, call in enumerate(calls)]


def _check_call(name: str, call: object) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{name} must have a name and arguments")
    arguments = function.get("arguments")
    if arguments is None or isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise ValueError(f"{name}.arguments is not valid JSON") from None
    if not isinstance(arguments, dict):
        raise ValueError(f"{name}.arguments must be a JSON object, not {type(arguments).__name__}")
    return call | {"function": function | {"arguments": arguments}}


def _check_content(name: str, content: object) -> str:
    """A string stays as it is; text parts are joined by line ends. A refusal is text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{name} must be a string or a list of text parts, not {type(content).__name__}")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if not isinstance(part, dict) or kind not in ("text", "refusal"):
            raise ValueError(f"{name}[{i}] is a part of type {kind!r:.80}; only parts of type 'text' are implemented")
        if not isinstance(part.get(kind), str):
            raise ValueError(f"{name}[{i}].{kind} must be a string")
        texts.append(part[kind])
    return "\n".join(texts)


def _tag_final(messages: list[Message]) -> str:
    """Mark the end of the last message's content (the messages are our copies); returns that content."""
    final = messages[-1].get("content")
    if not isinstance(final, str):
        raise ValueError("continue_final_message=True needs a last message with content")
    messages[-1]["content"] = final + _CONTINUE_TAG
    return final


def _cut_at_tag(text: str, final: str) -> str:
    at = text.rfind(_CONTINUE_TAG.strip())
    if at < 0 or final.strip() not in text:
        raise ValueError(
            "continue_final_message=True: the model's chat template does not show the last message in full"
        )
    keeps_spaces = text.startswith(_CONTINUE_TAG, at)
    return text[:at] if keeps_spaces else text[:at].rstrip()


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _make_dict,
        "namespace": _Namespace,
    }
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here it only lets its body through."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without underscore names, which would reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args  # so that a template may call namespace(self=...)
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_public(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} begins with an underscore")


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter: no HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
