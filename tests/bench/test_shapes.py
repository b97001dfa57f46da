"""The random weights of benchmarks/h200, which two engines load."""

from pathlib import Path

import pytest
import torch

from evenflow import LLM, SamplingParams


def test_a_checkpoint_is_made_once_and_whole_and_is_what_transformers_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks" / "h200")
    import shapes

    monkeypatch.setitem(shapes.SHAPES, "tiny", shapes._shape(64, 128, 2, 4, 2, 512, 10000.0))
    save = transformers.PreTrainedModel.save_pretrained

    def is_interrupted(model: object, directory: Path) -> None:
        save(model, directory)
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", is_interrupted)
    with pytest.raises(KeyboardInterrupt):
        shapes.write_checkpoint("tiny", tmp_path)
    assert not (tmp_path / "tiny").exists()
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", save)
    directory = shapes.write_checkpoint("tiny", tmp_path)
    made = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert shapes.write_checkpoint("tiny", tmp_path) == directory
    assert {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} == made

    weights = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert 0.019 < weights.model.layers[0].mlp.up_proj.weight.std() < 0.021
    prompt = [5, 6, 7, 8]
    expected = weights.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    llm = LLM(str(directory), dtype="float32", skip_tokenizer_init=True, max_model_len=128)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    assert output.outputs[0].token_ids == expected[0, len(prompt) :].tolist()
