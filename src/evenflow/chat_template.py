"""A model's chat template: messages -> prompt text, in Jinja's immutable sandbox.

Owns the environment (as in Hugging Face transformers, for which templates are written) and the check of the messages.
Knows no token ids. A template comes from the model's directory, never from a request.
"""

import json
from collections.abc import Callable, Sequence
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


class ChatTemplate:
    """One template, compiled at its first use. `variables` are the special tokens by name (bos_token, ...)."""

    def __init__(self, source: str, variables: dict[str, str]) -> None:
        self.source = source
        self._variables = variables

    @cached_property
    def _template(self) -> jinja2.Template:
        environment = _environment()
        self._reserved = {"messages", "tools", "add_generation_prompt", *environment.globals, *self._variables}
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
        options: dict[str, Any],
    ) -> str:
        """The prompt text. Raises ValueError with the template's own message, or naming the field that is wrong."""
        template, checked = self._template, check_messages(messages)
        if taken := sorted(options.keys() & self._reserved):
            raise ValueError(f"chat template option {taken[0]!r} is set by Evenflow and cannot be given")
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message=True needs add_generation_prompt=False")
        final = _tag_final(checked) if continue_final_message else ""
        variables: dict[str, Any] = {**self._variables, **options, "messages": checked, "tools": tools or None}
        try:
            text = template.render(variables, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template can raise anything that an expression can
            message = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"the model's chat template refused the messages: {message}") from None
        return _cut_at_tag(text, final) if continue_final_message else text


def check_messages(messages: Sequence[Message]) -> list[Message]:
    """Copies of the messages with every content as one string; keys whose value is None are left out.

    Raises ValueError that names the message and the part which cannot be used.
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
    elif not checked.get("tool_calls"):
        raise ValueError(f"{name} has no content; pass a string, or a list of text parts")
    return checked


def _check_content(name: str, content: object) -> str:
    """A string stays as it is; text parts are joined by line ends."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{name} must be a string or a list of text parts, not {type(content).__name__}")
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"{name}[{i}] is a part of type {kind!r:.80}; only parts of type 'text' are implemented")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{name}[{i}].text must be a string")
        texts.append(part["text"])
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
