"""Tokenizer, chat template and Detokenizer: against transformers, against the tokenizers library, and as properties."""

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from evenflow.detokenizer import MAX_WINDOW_TOKENS, Detokenizer
from evenflow.tokenizer import Tokenizer

CORPUS = [
    "Hello world, the quick brown fox jumps over the lazy dog. hello hello world",
    "Größe, naïve café, señor über l'été; Ελληνικά, русский язык",
    "你好世界 こんにちは 안녕하세요 🙂🙃🤖👩‍👩‍👧‍👦 🇫🇷 éèê",
]
TEXTS = st.text(st.sampled_from("abcdefgh \n\t.,'éßüñ你好世🙂👩\u200d🇫\ufffd\u0301�𝕏"), max_size=30)


def byte_level_backend() -> tokenizers.Tokenizer:
    """As Llama 3 and Qwen: byte-level BPE."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.add_tokens(["größer"])  # in GPT-2's alphabet its letters would be single bytes
    return backend


def sentencepiece_backend() -> tokenizers.Tokenizer:
    """As Llama 2: BPE with byte fallback, a prepended space that the decoder strips."""
    words = ["▁", "▁hello", "▁world", "hello", "lo", "ab", "▁a", "é", "▁▁", *"abcdefghlorw.,'ß"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": b + 3 for b in range(256)}
    for word in words:
        vocab.setdefault(word, len(vocab))
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, [("a", "b"), ("▁", "a"), ("▁", "▁")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def metaspace_backend() -> tokenizers.Tokenizer:
    """A decoder that looks at positions: only the window can stream it."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
BYTE_LEVEL = Tokenizer(byte_level_backend(), NAMES, {})
SENTENCEPIECE = Tokenizer(sentencepiece_backend(), NAMES, {})
METASPACE = Tokenizer(metaspace_backend(), NAMES, {})
# The same byte-level tokens without knowledge of their bytes.
WINDOW = Tokenizer(byte_level_backend(), NAMES, {})
WINDOW.decoding = None
BOTH = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte_level", "sentencepiece"])
IDS = st.lists(st.integers(0, 420), max_size=12)
CUTS = st.lists(st.integers(0, 12), max_size=4)


def stream(tokenizer: Tokenizer, prompt: list[int], output: list[int], cuts: list[int], skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt, skip)
    borders = sorted({0, len(output), *[c for c in cuts if c < len(output)]})
    texts = [detokenizer.append(output[a:b]) for a, b in pairwise(borders)]
    return [*texts, detokenizer.flush()]


def id_of(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.backend.token_to_id(token)
    assert token_id is not None
    return token_id


def save(backend: tokenizers.Tokenizer, path: Path, **config: Any) -> Path:
    backend.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@BOTH
@given(text=TEXTS)
@settings(max_examples=150, deadline=None)
def test_streaming_an_encoded_text_gives_it_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(stream(tokenizer, [], ids, list(range(len(ids))))) == text
    assert tokenizer.decode(ids) == text


@BOTH
@given(prompt=IDS, output=IDS, cuts=CUTS, skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_ids_in_any_chunks_stream_as_they_decode(
    tokenizer: Tokenizer, prompt: list[int], output: list[int], cuts: list[int], skip: bool
) -> None:
    pieces = stream(tokenizer, prompt, output, cuts, skip)
    whole, before = tokenizer.decode(prompt + output, skip), tokenizer.decode(prompt, skip)
    shared = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
    assert "".join(pieces) == whole[shared:]
    assert pieces == stream(tokenizer, prompt, output, cuts, skip)


@given(prompt=IDS, output=IDS, cuts=CUTS)
@settings(max_examples=150, deadline=None)
def test_the_window_streams_the_same_in_any_chunks(prompt: list[int], output: list[int], cuts: list[int]) -> None:
    whole = "".join(stream(WINDOW, prompt, output, []))
    assert "".join(stream(WINDOW, prompt, output, cuts)) == whole


@given(text=TEXTS, prompt_text=TEXTS)
@settings(max_examples=150, deadline=None)
def test_the_window_agrees_with_the_bytes_on_valid_text(text: str, prompt_text: str) -> None:
    prompt = BYTE_LEVEL.encode(prompt_text)
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    if "größer" not in text:
        assert "".join(stream(WINDOW, prompt, ids, [])) == text


@given(text=st.text("ab helo", max_size=20).map(str.strip), cut=st.integers(0, 20))
@settings(max_examples=100, deadline=None)
def test_a_decoder_with_position_rules_streams_through_the_window(text: str, cut: int) -> None:
    ids = METASPACE.encode(text, add_special_tokens=False)
    assert METASPACE.decoding is None
    out = METASPACE.decode(ids[:cut]) + "".join(stream(METASPACE, ids[:cut], ids[cut:], []))
    assert out == METASPACE.decode(ids)
    special = [id_of(METASPACE, "<s>")] * 9
    after = "".join(stream(METASPACE, [*ids[:1], *special], [*special, *ids[1:]], []))
    assert METASPACE.decode(ids[:1]) + after == METASPACE.decode(ids)


@given(ids=st.lists(st.integers(0, 399), max_size=12))
@settings(max_examples=200, deadline=None)
def test_decode_equals_the_library_on_trained_tokens(ids: list[int]) -> None:
    for skip in (True, False):
        assert BYTE_LEVEL.decode(ids, skip) == BYTE_LEVEL.backend.decode(ids, skip_special_tokens=skip)


@given(text=TEXTS)
@settings(max_examples=100, deadline=None)
def test_sentencepiece_decode_equals_the_library_on_valid_text(text: str) -> None:
    ids = SENTENCEPIECE.encode(text)
    for skip in (True, False):
        assert SENTENCEPIECE.decode(ids, skip) == SENTENCEPIECE.backend.decode(ids, skip_special_tokens=skip)


@BOTH
def test_never_half_a_character_and_bytes_that_stay_invalid_come_out(tokenizer: Tokenizer) -> None:
    lead = [i for b in b"\xf0\x9f\x99" for i in byte_ids(tokenizer, b)]
    last, letter = byte_ids(tokenizer, 0x82)[0], byte_ids(tokenizer, 0x61)[0]
    assert stream(tokenizer, [], [*lead, last], [1, 2, 3]) == ["", "", "", "🙂", ""]
    assert stream(tokenizer, [], [*lead, letter], [1, 2, 3]) == ["", "", "", "\ufffda", ""]
    assert stream(tokenizer, [], lead, [1, 2, 3]) == ["", "", "", "\ufffd"]
    assert stream(tokenizer, [], [byte_ids(tokenizer, 0xFF)[0]] * 3, [1, 2]) == ["\ufffd"] * 3 + [""]


@BOTH
def test_a_genuine_replacement_character_is_text(tokenizer: Tokenizer) -> None:
    ids = [byte_ids(tokenizer, b)[0] for b in "\ufffd".encode()]
    assert "".join(stream(tokenizer, [], ids, [1, 2])) == "\ufffd"
    assert "".join(stream(tokenizer, ids[:1], ids[1:], [1])) == "\ufffd"
    assert "".join(stream(WINDOW, [], [byte_ids(WINDOW, b)[0] for b in "\ufffda".encode()], [])) == "\ufffda"


@BOTH
def test_a_prompt_that_ends_within_a_character_does_not_leak(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello ", add_special_tokens=False) + [byte_ids(tokenizer, b)[0] for b in "🙂".encode()]
    letter = byte_ids(tokenizer, 0x61)[0]
    for tok in (tokenizer, WINDOW) if tokenizer is BYTE_LEVEL else (tokenizer,):
        assert "".join(stream(tok, ids[:-2], [*ids[-2:], letter], [])) == "🙂a"
        assert "".join(stream(tok, ids[:-2], [letter], [])) == "a"
        assert "".join(stream(tok, ids[:-2], [], [])) == ""
    surrogate = [byte_ids(tokenizer, b)[0] for b in b"\xed\xa0"]  # never valid, but Python's decoder waits for more
    assert "".join(stream(tokenizer, surrogate, [letter], [])) == "a"


def test_the_window_waits_for_characters_that_show_as_one_replacement_per_byte() -> None:
    tokenizer = Tokenizer(sentencepiece_backend(), NAMES, {})
    tokenizer.decoding = None
    ids = [3 + b for b in "🙂".encode()]
    assert "".join(stream(tokenizer, [], [*ids, id_of(tokenizer, "ab")], [1, 2, 3])) == "🙂ab"


def byte_ids(tokenizer: Tokenizer, byte: int) -> list[int]:
    return [
        i for i in range(tokenizer.vocab_size) if tokenizer.decoding and tokenizer.token_bytes(i) == bytes([byte])
    ] or [i for i in range(BYTE_LEVEL.vocab_size) if BYTE_LEVEL.token_bytes(i) == bytes([byte])]


def test_leading_space_after_a_prompt_is_kept_and_at_the_beginning_is_not() -> None:
    space_hello = id_of(SENTENCEPIECE, "▁hello")
    assert stream(SENTENCEPIECE, [space_hello], [space_hello], []) == [" hello", ""]
    assert stream(SENTENCEPIECE, [], [space_hello, space_hello], [1]) == ["hello", " hello", ""]
    assert stream(SENTENCEPIECE, [1], [space_hello], []) == ["hello", ""]  # a hidden BOS is no text
    assert stream(SENTENCEPIECE, [1], [space_hello], [], skip=False) == [" hello", ""]


def test_special_tokens_are_skipped_or_shown() -> None:
    ids = [0, *BYTE_LEVEL.encode("hello", add_special_tokens=False), 1, 99999]
    assert "".join(stream(BYTE_LEVEL, [], ids, [])) == "hello"
    assert "".join(stream(BYTE_LEVEL, [], ids, [], skip=False)) == "<s>hello</s>"


def test_bytes_and_text_of_single_tokens() -> None:
    assert BYTE_LEVEL.token_bytes(byte_ids(BYTE_LEVEL, 0xF0)[0]) == b"\xf0"
    assert BYTE_LEVEL.token_text(byte_ids(BYTE_LEVEL, 0xF0)[0]) == "\ufffd"
    added = id_of(BYTE_LEVEL, "größer")
    assert BYTE_LEVEL.token_bytes(added) == "größer".encode()
    assert SENTENCEPIECE.token_text(id_of(SENTENCEPIECE, "▁hello")) == " hello"
    assert SENTENCEPIECE.token_bytes(3 + 0x0A) == b"\n"
    assert BYTE_LEVEL.token_bytes(-1) == b"" == BYTE_LEVEL.token_bytes(10**6)
    assert METASPACE.token_bytes(id_of(METASPACE, "<s>")) == b"<s>"


def test_streaming_costs_the_same_for_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []  # tokens in each call of the tokenizer
    decode = Tokenizer.decode

    def counted(self: Tokenizer, token_ids: Any, skip_special_tokens: bool = True) -> str:
        decoded.append(len(token_ids))
        return decode(self, token_ids, skip_special_tokens)

    monkeypatch.setattr(Tokenizer, "decode", counted)
    ids = BYTE_LEVEL.encode(" ".join(CORPUS) * 20, add_special_tokens=False)
    for tokenizer in (BYTE_LEVEL, WINDOW):
        detokenizer = Detokenizer(tokenizer, [0], True)
        detokenizer.append(ids[:500])
        first, num_calls = sum(decoded), len(decoded)
        detokenizer.append(ids[500:1000])
        assert (len(decoded) == 0) == (tokenizer is BYTE_LEVEL)
        assert sum(decoded) - first <= 6 * 500  # measured 4.2 for a token
        assert abs(sum(decoded) - 2 * first) <= 0.1 * first
        assert max(decoded[num_calls:], default=0) <= MAX_WINDOW_TOKENS


def test_encode_batch_and_special_tokens() -> None:
    assert BYTE_LEVEL.encode("hello")[0] == BYTE_LEVEL.bos_token_id == 0
    assert BYTE_LEVEL.encode("hello", add_special_tokens=False)[0] != 0
    assert BYTE_LEVEL.encode_batch(["hello", "world"]) == [BYTE_LEVEL.encode("hello"), BYTE_LEVEL.encode("world")]
    assert BYTE_LEVEL.eos_token_id == 1
    assert BYTE_LEVEL.special_ids == {0, 1, 2}
    assert BYTE_LEVEL.vocab_size == BYTE_LEVEL.backend.get_vocab_size() == 401


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff"])
def test_lone_surrogates_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="lone surrogate"):
        BYTE_LEVEL.encode(text)
    with pytest.raises(ValueError, match=r"texts\[1\] has a lone surrogate"):
        BYTE_LEVEL.encode_batch(["a", text])


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    backend = byte_level_backend()
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    tokenizer = Tokenizer.from_dir(save(backend, tmp_path))
    assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"


def test_from_dir_names_the_file_at_fault(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer\.json; make one with transformers"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"only tokenizer\.model\).*save_pretrained"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        Tokenizer.from_dir(tmp_path)
    save(byte_level_backend(), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        Tokenizer.from_dir(tmp_path)


def test_special_tokens_from_config_and_map(tmp_path: Path) -> None:
    extra = {"401": {"content": "<extra>", "special": True}}
    # A trained token that only the configuration calls special.
    word = max(
        (t for t in BYTE_LEVEL.backend.get_vocab(with_added_tokens=False) if t.isascii() and t.isalpha()), key=len
    )
    save(byte_level_backend(), tmp_path, bos_token={"content": "<s>"}, eos_token=word, added_tokens_decoder=extra)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "</s>"}, "bos_token": "x"}))
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.named_tokens == {"bos_token": "<s>", "eos_token": word, "pad_token": "</s>"}
    assert tokenizer.encode("a<extra>", add_special_tokens=False)[-1] == 401
    assert tokenizer.eos_token_id in tokenizer.special_ids
    assert tokenizer.decode(tokenizer.encode(f"a.{word}<extra>")) == "a."
    save(byte_level_backend(), tmp_path, added_tokens_decoder={"900": {"content": "<far>"}})
    with pytest.raises(ValueError, match="'<far>' cannot have id 900"):
        Tokenizer.from_dir(tmp_path)


TEMPLATE = """{{ bos_token }}{% for m in messages %}
    {% if m.role == 'system' %}
[{{ m.content | trim }}]{% if m.name is defined %}?{% endif %}

    {% elif m.role == 'bad' %}
{{ raise_exception('no bad role') }}
    {% else %}
<|user|>{{ m.name if m.name is defined }}{{ m.content }}{% generation %}!{% endgeneration %}
    {% endif %}
    {% if loop.index > 5 %}{% break %}{% endif %}
{% endfor %}
{% if tools %}{{ tools | tojson }}{% endif %}
{% if flavour is defined %}{{ flavour }}{% endif %}
{% if add_generation_prompt %}
>{% endif %}"""
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hello é"}],
    [{"role": "system", "content": " be good \n"}, {"role": "user", "content": " a ", "name": None}],
    [{"role": "user", "content": str(i)} for i in range(8)],
    [{"role": "system", "content": "the template trims this \n"}],
]


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_generation_prompt": False},
        {"tools": [{"name": "é<b>&'"}]},
        {"template_options": {"flavour": "salt"}},
        {"add_generation_prompt": False, "continue_final_message": True},
    ],
)
def test_chat_template_renders_as_transformers(tmp_path: Path, messages: list[dict[str, Any]], options: Any) -> None:
    from transformers import AutoTokenizer

    path = save(byte_level_backend(), tmp_path, **NAMES, chat_template=TEMPLATE)
    oracle, tokenizer = AutoTokenizer.from_pretrained(str(path)), Tokenizer.from_dir(path)
    arguments = {"add_generation_prompt": True} | options
    arguments |= arguments.pop("template_options", {})
    if options.get("continue_final_message") and len(messages) > 5:  # the template leaves the last message out
        for apply in (oracle.apply_chat_template, tokenizer.apply_chat_template):
            with pytest.raises(ValueError, match=r"last message|final message"):
                apply(messages, **options)
        return
    expected = oracle.apply_chat_template(messages, tokenize=False, **arguments)
    assert tokenizer.apply_chat_template(messages, **options) == expected
    ids: Any = oracle.apply_chat_template(messages, tokenize=True, return_dict=False, **arguments)
    assert tokenizer.chat_prompt(messages, **options).token_ids == ids
    assert ids.count(0) == 1


def chat_tokenizer(template: str) -> Tokenizer:
    return Tokenizer(byte_level_backend(), NAMES, {"default": template})


def test_templates_from_files_win(tmp_path: Path) -> None:
    hello = [{"role": "user", "content": "x"}]
    templates = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    save(byte_level_backend(), tmp_path, chat_template=templates)
    assert Tokenizer.from_dir(tmp_path).apply_chat_template(hello) == "D"
    assert Tokenizer.from_dir(tmp_path).apply_chat_template(hello, tools=[{}]) == "T"
    (tmp_path / "chat_template.jinja").write_text("F")
    assert Tokenizer.from_dir(tmp_path).apply_chat_template(hello) == "F"
    with pytest.raises(ValueError, match="no chat template; use generate"):
        BYTE_LEVEL.apply_chat_template(hello)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only users') }}", "only users"),
        ("{% if %}", "does not compile"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{% set ns = namespace(_x=1) %}", "underscore"),
    ],
)
def test_template_faults_are_value_errors(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chat_tokenizer(template).apply_chat_template([{"role": "user", "content": "x"}])


def calling(arguments: Any) -> dict[str, Any]:
    """A tool call in the history."""
    return {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one"),
        ("hello", "must be a list"),
        (["hello"], r"messages\[0\] must be a dict"),
        ([{"content": "x"}], r"messages\[0\]\.role=None"),
        ([{"role": "user"}], "no content"),
        ([{"role": "user", "content": 3}], "string or a list of text parts"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"content\[0\] is a part of type 'image_url'"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], r"content\[0\]\.text must be a string"),
        ([{"role": "user", "content": [{"type": "refusal"}]}], r"content\[0\]\.refusal must be a string"),
        ([{"role": "assistant", "tool_calls": 1}], r"messages\[0\]\.tool_calls must be a list"),
        ([{"role": "assistant", "tool_calls": [1]}], r"messages\[0\]\.tool_calls\[0\]\.function must have a name"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], r"tool_calls\[0\]\.function must have a name"),
        ([{"role": "assistant", "tool_calls": [calling("{")]}], r"arguments is not valid JSON"),
        ([{"role": "assistant", "tool_calls": [calling('["x"]')]}], r"arguments must be a JSON object, not list"),
    ],
)
def test_messages_are_checked(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chat_tokenizer(TEMPLATE).apply_chat_template(messages)


def test_parts_are_joined_and_options_cannot_replace_ours() -> None:
    tokenizer = chat_tokenizer("{{ messages[0].content }}|{{ dict(a=1).a }}{{ strftime_now('%%') }}")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}]
    assert tokenizer.apply_chat_template(messages) == "a\nb|1%"
    assert messages == [{"role": "user", "content": parts}]
    ours = ("bos_token", "raise_exception", "range", "self", "chat_template")
    for name in (*ours, "messages", "tools", "add_generation_prompt", "continue_final_message"):
        for take in (tokenizer.apply_chat_template, tokenizer.chat_prompt):
            with pytest.raises(ValueError, match=f"chat_template_kwargs has '{name}'"):
                take(messages, template_options={name: True})
    for options in (["flavour"], {1: 2}):
        with pytest.raises(ValueError, match="chat_template_kwargs must be a dict"):
            tokenizer.apply_chat_template(messages, template_options=cast(Any, options))
    with pytest.raises(ValueError, match="add_generation_prompt=False"):
        tokenizer.apply_chat_template(messages, continue_final_message=True)


@pytest.mark.parametrize("given", ['{"x": "<s>"}', {"x": "<s>"}, '{"x": "\\u003cs>"}'])
def test_arguments_of_calls_are_objects_for_the_template(given: Any) -> None:
    tokenizer = chat_tokenizer("{{ messages[1].tool_calls[0].function.arguments.x }}")
    call = calling(given)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert tokenizer.apply_chat_template(messages) == "<s>"
    text, token_ids = tokenizer.chat_prompt(messages)
    assert text == tokenizer.decode(token_ids, skip_special_tokens=True) == "<s>"
    assert call == calling(given)  # the client's own is left alone
    empty = chat_tokenizer("{{ messages[0].tool_calls[0].function.arguments | tojson }}")
    for nothing in (None, "", "{}", {}):
        assert empty.apply_chat_template([{"role": "assistant", "tool_calls": [calling(nothing)]}]) == "{}"


def test_roles_and_contents_of_openai() -> None:
    tokenizer = chat_tokenizer("{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}")
    refusal = [{"type": "refusal", "refusal": "no"}]
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "assistant", "content": None},
        {"role": "assistant"},
        {"role": "assistant", "content": refusal},
    ]
    assert tokenizer.apply_chat_template(messages) == "system:be brief;assistant:;assistant:;assistant:no;"
    knowing = chat_tokenizer("{% if messages[0].role == 'developer' %}D{% endif %}")
    assert knowing.apply_chat_template(messages) == "D"


def test_special_tokens_in_a_message_are_text() -> None:
    tokenizer = chat_tokenizer(
        "{{ bos_token }}{{ messages[0].content }}{{ messages[0].get('more', {}).get('x', [''])[0] }}"
    )
    bos = tokenizer.bos_token_id
    for message in (
        {"role": "user", "content": "<s>hello</s>"},
        {"role": "user", "content": [{"type": "text", "text": "<s>hello"}, {"type": "text", "text": "</s>\ue000<s>"}]},
        {"role": "user", "content": "hello", "more": {"x": ["<s>"]}},
    ):
        token_ids = tokenizer.chat_prompt([message]).token_ids
        assert token_ids[0] == bos
        assert bos not in token_ids[1:]
        assert tokenizer.eos_token_id not in token_ids
        content = message["content"]
        text = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
        assert tokenizer.decode(token_ids) == text + message.get("more", {"x": [""]})["x"][0]
    assert tokenizer.chat_prompt([{"role": "user", "content": "hello"}]).token_ids == tokenizer.encode("hello")


def test_random_bytes_decode_as_a_strict_utf8_decoder_says() -> None:
    rng = random.Random(0)
    for _ in range(300):
        data = bytes(rng.choice(b"\x41\x80\xbf\xc3\xe4\xed\xa0\xf0\x9f\xf4\x90\xff") for _ in range(8))
        ids = [byte_ids_table[b] for b in data]
        assert "".join(stream(BYTE_LEVEL, [], ids, list(range(8)))) == data.decode("utf-8", "replace")


byte_ids_table = {b[0]: i for i in range(BYTE_LEVEL.vocab_size) if len(b := BYTE_LEVEL.token_bytes(i)) == 1}
