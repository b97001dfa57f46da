"""Certificates: the comparison by hand, tampering, an engine beside itself and beside a damaged one, servers."""

import json
import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from evenflow.cli import main
from evenflow.model_files import find_model
from evenflow.parity.certificate import Certificate, Position, Sequence, fingerprint, load
from evenflow.parity.comparing import Bounds, compare

PROMPT, OUTPUT = [5, 6], [7, 8, 9]
POSITIONS = [
    Position([7, 1], [-0.1, -2.0], -0.1),
    Position([8, 2], [-0.5, -0.55], -0.5),  # a near tie
    Position([9, 3], [-0.2, -3.0], -0.2),
]


@pytest.fixture
def certificate():
    return Certificate("m", "f", 2, {}, [Sequence(PROMPT, OUTPUT, POSITIONS)])


def test_the_same_has_no_gap(certificate):
    verdict = compare(certificate, [POSITIONS], Bounds(), [OUTPUT])
    assert (verdict.top1, verdict.mean_gap, verdict.max_gap, verdict.first_divergence) == (1.0, 0.0, 0.0, None)
    assert verdict.passed


def test_gaps_and_agreement_by_hand(certificate):
    other = [
        Position([7, 1], [-0.13, -2.2], -0.13),  # the second token differs most: 0.2
        Position([2, 8], [-0.5, -0.54], -0.54),  # the near tie falls to the other side: 0.04 and 0.05
        Position([3, 9], [-0.3, -0.6], -0.6),  # a clear one, lost: 0.4 and 2.7
    ]
    verdict = compare(certificate, [other], Bounds(), [[7, 2, 9]])
    assert verdict.top1 == pytest.approx(1 / 3)
    assert (verdict.num_near_ties, verdict.top1_clear) == (1, 0.5)
    assert verdict.mean_gap == pytest.approx((0.2 + 0.05 + 2.7) / 3)
    assert (verdict.max_gap, verdict.worst) == (pytest.approx(2.7), (0, 2))
    assert (verdict.first_divergence, verdict.num_diverged) == ((0, 1), 1)
    assert len(verdict.failures) == 3


def test_tokens_that_only_one_side_names_have_no_gap(certificate):
    other = [POSITIONS[0], Position([8, 77], [-0.5, -0.6], -0.5), POSITIONS[2]]
    assert compare(certificate, [other], Bounds()).max_gap == 0.0


@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan_fails_wherever_it_is(certificate, place):
    other = list(POSITIONS)
    other[place] = Position(POSITIONS[place].token_ids, [math.nan, -2.0], math.nan)
    verdict = compare(certificate, [other], Bounds())
    assert not verdict.passed
    assert verdict.worst == (0, place)
    assert math.isnan(verdict.max_gap)


@pytest.mark.parametrize(("tokens", "place"), [([7, 8], 2), ([7, 8, 9, 1], 3), ([1, 8, 9], 0)])
def test_divergence_counts_length_too(certificate, tokens, place):
    assert compare(certificate, [POSITIONS], Bounds(), [tokens]).first_divergence == (0, place)


def test_positions_that_are_missing_are_refused(certificate):
    with pytest.raises(ValueError, match="has 3 positions, the other engine tells of 2"):
        compare(certificate, [POSITIONS[:2]], Bounds())


@pytest.mark.parametrize("field", ["min_top1", "max_mean_gap", "max_gap", "near_tie"])
def test_bounds_are_checked(field):
    with pytest.raises(ValueError, match=f"--{field.replace('_', '-')}"):
        Bounds(**{field: -0.1})


def test_a_certificate_comes_back_and_a_changed_one_does_not(certificate, tmp_path):
    path = tmp_path / "c.json"
    certificate.save(path)
    assert load(path) == certificate
    path.write_text(path.read_text().replace("-0.55", "-0.56"))
    with pytest.raises(ValueError, match="was changed after it was recorded"):
        load(path)


@pytest.mark.parametrize(
    ("text", "message"), [("{}", "is no certificate"), ("", "cannot be read"), (None, "evenflow parity record")]
)
def test_what_is_no_certificate_is_refused(tmp_path, text, message, capsys):
    path = tmp_path / "c.json"
    if text is not None:
        path.write_text(text)
    assert main(["parity", "check", str(path)]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("parity") / "demo.json"
    (path.parent / "prompts.txt").write_text("Once upon a time\nThe wolf came to the door\n1, 2, 3,\n")
    arguments = ["--prompts", str(path.parent / "prompts.txt"), "--max-tokens", "16", "--top-k", "4"]
    assert main(["parity", "record", "demo", str(path), *arguments]) == 0
    return path


def test_the_engine_passes_its_own_certificate_in_two_types(recorded, tmp_path, capsys):
    assert main(["parity", "check", str(recorded), "--output", str(tmp_path / "v.json")]) == 0
    verdict = json.loads((tmp_path / "v.json").read_text())
    assert (verdict["top1"], verdict["max_gap"], verdict["num_compared"]) == (1.0, 0.0, 48)
    assert main(["parity", "check", str(recorded), "--dtype", "float16", "--output", str(tmp_path / "v.json")]) == 0
    assert 0 < json.loads((tmp_path / "v.json").read_text())["mean_gap"] < 0.02
    assert "passed" in capsys.readouterr().out


def test_recorded_positions_are_those_of_the_greedy_tokens(recorded):
    certificate = load(recorded)
    for sequence in certificate.sequences:
        assert [position.token_ids[0] for position in sequence.positions] == sequence.output_token_ids
        assert all(position.logprob == position.logprobs[0] for position in sequence.positions)


def test_other_weights_fail_and_are_named(recorded, tmp_path, capsys):
    """One projection of one layer is 10 % smaller."""
    directory = tmp_path / "damaged"
    shutil.copytree(find_model("demo"), directory)
    [weights] = directory.glob("*.safetensors")
    tensors = load_file(weights)
    tensors["model.layers.0.self_attn.o_proj.weight"] *= 0.9
    save_file(tensors, weights, metadata={"format": "pt"})
    assert main(["parity", "check", str(recorded), "--model", str(directory)]) == 1
    out = capsys.readouterr().out
    assert "warning" in out
    assert "FAILED               mean gap" in out


def test_the_fingerprint_sees_any_place_of_a_file(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    content = bytearray(100_000)
    marks = []
    for place in (None, 0, 51_234, 99_999):
        changed = content.copy()
        if place is not None:
            changed[place] = 1
        (tmp_path / "m.safetensors").write_bytes(changed)
        marks.append(fingerprint(tmp_path))
    assert len(set(marks)) == 4
    monkeypatch.setattr("evenflow.parity.certificate.WHOLE_FILE_BYTES", 10)
    (tmp_path / "m.safetensors").write_bytes(content)
    sampled = fingerprint(tmp_path)
    (tmp_path / "m.safetensors").write_bytes(content[:-1] + b"\1")
    assert fingerprint(tmp_path) != sampled


def as_vllm(positions, prompt):
    entries = [None, *[{"1": {"logprob": -1.0}}] * (len(prompt) - 1)]
    for position in positions:
        pairs = zip(position.token_ids, position.logprobs, strict=True)
        entries.append({str(token): {"logprob": logprob, "rank": 1} for token, logprob in pairs})
    return entries


def check_remotely(certificate, server, tmp_path):
    certificate.save(tmp_path / "c.json")
    return main(["parity", "check", str(tmp_path / "c.json"), "--base-url", server.url])


@pytest.mark.parametrize(("shift", "code"), [(0.0, 0), (0.6, 1)])
def test_a_server_with_prompt_logprobs_is_checked(certificate, server, tmp_path, shift, code):
    def answer(body):
        assert body["prompt"] == PROMPT + OUTPUT
        assert body["prompt_logprobs"] == 2
        shifted = [Position(p.token_ids, [v - shift for v in p.logprobs], p.logprob - shift) for p in POSITIONS]
        return 200, json.dumps({"choices": [{"prompt_logprobs": as_vllm(shifted, PROMPT)}]}).encode()

    server.answer = answer
    assert check_remotely(certificate, server, tmp_path) == code


@pytest.mark.parametrize(("best", "code"), [(-0.2, 0), (-0.01, 1)])
def test_a_server_that_only_echoes_is_checked_by_its_tokens(certificate, server, tmp_path, best, code, capsys):
    def answer(body):
        if not body.get("echo"):
            return 400, b'{"error": {"message": "prompt_logprobs is not supported"}}'
        own = [None, -1.0, *(position.logprob for position in POSITIONS), -1.0]
        top = [None, {"x": -1.0}, {"a": -0.1}, {"b": -0.5}, {"c": best}, {"d": -1.0}]
        return 200, json.dumps({"choices": [{"logprobs": {"token_logprobs": own, "top_logprobs": top}}]}).encode()

    server.answer = answer
    assert check_remotely(certificate, server, tmp_path) == code
    assert "echo: own log-probabilities only" in capsys.readouterr().out


def test_a_server_without_either_is_refused_with_both_reasons(certificate, server, tmp_path, capsys):
    server.answer = lambda body: (200, b'{"choices": [{"text": "x"}]}')
    assert check_remotely(certificate, server, tmp_path) == 2
    assert "no prompt_logprobs; with echo, the answer echoes no log-probabilities" in capsys.readouterr().err


def test_bad_options_are_refused_by_name(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n")
    for arguments, message in (
        (["--prompts", str(tmp_path / "empty.txt")], "holds no prompt"),
        (["--prompts", str(tmp_path / "none.txt")], "cannot be read"),
        (["--max-tokens", "0"], "--max-tokens 0 must be at least 1"),
    ):
        assert main(["parity", "record", "demo", str(Path(tmp_path, "c.json")), *arguments]) == 2
        assert message in capsys.readouterr().err
