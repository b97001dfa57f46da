"""The shipped demo model: its size and files, its tokenizer, what it answers, and the figures it claims."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from evenflow.demo import MODEL_DIR, TALES_DIR
from evenflow.demo.corpus import HELD_OUT, Tale, load_tales, split_held_out, title_case
from evenflow.demo.documents import DocumentMaker
from evenflow.demo.evaluate import perplexity

FILES = ("config.json", "generation_config.json", "metrics.json", "model.safetensors", "tokenizer.json")


@pytest.fixture(scope="module")
def tales() -> list[Tale]:
    return load_tales(TALES_DIR)


@pytest.fixture(scope="module")
def model() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


def metrics() -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((MODEL_DIR / "metrics.json").read_text())
    return figures


def size_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def test_files_are_there_and_small() -> None:
    for name in (*FILES, "tokenizer_config.json"):
        assert (MODEL_DIR / name).is_file(), name
    assert size_bytes(MODEL_DIR) + size_bytes(TALES_DIR) <= 12_000_000


def test_tales_are_split_whole(tales: list[Tale]) -> None:
    train, held_out = split_held_out(tales)
    assert len(tales) == 418
    assert len(held_out) == len(HELD_OUT) == 21
    assert not {tale.title for tale in train} & HELD_OUT
    assert all(tale.paragraphs for tale in tales)
    assert tales[0].title == "The Wolf and the Lamb"
    assert tales[0].text.startswith("The Wolf and the Lamb\n\nA Wolf, ")


def test_title_case() -> None:
    assert title_case("LITTLE RED-CAP [LITTLE RED RIDING HOOD]") == "Little Red-Cap"
    assert title_case("THE KING OF THE GOLDEN MOUNTAIN") == "The King of the Golden Mountain"


@pytest.mark.parametrize(
    "text", ["Once upon a time", " two  spaces\n\n\nand\tlines ", "Größe 日本語 🙂 'tis", "<|", ""]
)
def test_tokenizer_round_trip(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert ids[0] == tokenizer.token_to_id("<|begin|>")
    assert tokenizer.decode(ids) == text


def test_transformers_reads_the_tokenizer_and_its_chat_template() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    messages = [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|begin|><|system|>Be brief.<|user|>Hi<|assistant|>"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|begin|>", "<|end|>", "<|pad|>")
    with pytest.raises(Exception, match="roles are system, user and assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}], tokenize=False)


def test_parameter_count(model: Any) -> None:
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert 4_000_000 <= num_parameters <= 6_000_000
    assert num_parameters == metrics()["num_parameters"]


def test_claimed_perplexity_of_held_out_tales_is_true(model: Any, tales: list[Tale]) -> None:
    claimed = metrics()["probe"]
    assert set(claimed["titles"]) <= HELD_OUT
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    probe = [tale for tale in tales if tale.title in claimed["titles"]]
    maker = DocumentMaker(tokenizer, probe, max_length=1024)
    measured = perplexity(model, maker, maker.tales)
    assert measured["num_tokens"] == claimed["num_tokens"]
    assert math.isclose(measured["perplexity"], claimed["perplexity"], rel_tol=0.02)


def test_chat_tells_the_tale_that_is_asked_for(model: Any, tales: list[Tale]) -> None:
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    prompt = DocumentMaker(tokenizer, [], max_length=1024).prompt("tell me the tale of the wolf and the lamb")
    output = model.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)
    answer = tokenizer.decode(output[0, len(prompt) :].tolist())
    assert "Wolf" in answer
    assert "Lamb" in answer
    assert tales[0].text.startswith(answer)
