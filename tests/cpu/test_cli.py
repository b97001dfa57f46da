"""The command line: what it prints, its exit codes, and that it answers without torch."""

import dataclasses
import io
import json
import os
import subprocess
import sys

import pytest
from checkpoints import edit_config, make_checkpoint

import evenflow.llm
from evenflow import EngineConfig, SamplingParams
from evenflow.cli import COMMANDS, main
from evenflow.cli.options import SAMPLING
from evenflow.request import CompletionOutput, RequestOutput
from evenflow.tokenizer import ChatPrompt


class FakeTokenizer:
    def chat_prompt(self, messages):
        text = "".join(message["content"] for message in messages)
        return ChatPrompt(text, [0] * len(text))


class FakeLLM:
    """Answers with the prompt in capitals, a character per step."""

    made: "list[FakeLLM]"
    memory_account = "memory: enough"
    tokenizer = FakeTokenizer()
    settings = dataclasses.make_dataclass("Settings", ["max_model_len"])(100)

    def __init__(self, model, **options):
        self.model, self.options, self.params, self.conversations = model, options, None, []
        FakeLLM.made.append(self)

    def default_sampling_params(self):
        return SamplingParams(temperature=0.3, max_tokens=7)

    def stream(self, prompt, params):
        self.params = params
        text = f" {prompt.upper()}"
        for end in range(1, len(text) + 1):
            completion = CompletionOutput(0, text[:end], list(range(end)))
            yield RequestOutput("0", prompt, [1], [completion], finished=end == len(text))

    def stream_chat(self, messages, params):
        self.conversations.append([dict(message) for message in messages])
        return self.stream(messages[-1]["content"], params)

    def generate(self, prompts, params):
        self.params = params
        return [
            RequestOutput(
                str(i),
                prompt,
                [1],
                [CompletionOutput(k, f" {prompt.upper()}{k}", [1, 2]) for k in range(params.n)],
                True,
            )
            for i, prompt in enumerate(prompts)
        ]


@pytest.fixture
def fake(monkeypatch):
    FakeLLM.made = []
    monkeypatch.setattr(evenflow.llm, "LLM", FakeLLM)
    return FakeLLM.made


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def test_generate_streams_one_prompt(capsys, fake):
    code, out, err = run(capsys, "generate", "once", "--seed", "5", "--stop", "x", "--stop", "y", "--block-size", "8")
    assert (code, out) == (0, "once ONCE\n")
    assert err.startswith("[5 tokens in ")
    assert "first token after" in err
    assert (fake[0].model, fake[0].options) == ("demo", {"block_size": 8})
    assert fake[0].params == SamplingParams(temperature=0.3, max_tokens=7, seed=5, stop=["x", "y"])


def test_generate_many(capsys, fake, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("b\n\nc\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("from stdin\n"))
    code, out, err = run(
        capsys, "generate", "a", "-", "--prompts-file", str(tmp_path / "prompts.txt"), "--n", "2", "--json"
    )
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [(r["prompt"], r["index"]) for r in records] == [
        (p, i) for p in ("a", "from stdin", "b", "c") for i in (0, 1)
    ]
    assert records[0]["text"] == " A0"
    assert "[16 tokens in" in err


def test_an_error_of_one_request_is_told(capsys, fake, monkeypatch):
    failed = RequestOutput("0", "a", [1], [CompletionOutput(0, "", [], finish_reason="error", error="planted")], True)
    monkeypatch.setattr(FakeLLM, "generate", lambda *args: [failed])
    monkeypatch.setattr(FakeLLM, "stream", lambda *args: iter([failed]))
    code, out, err = run(capsys, "generate", "a", "b")
    assert (code, out) == (1, "")
    assert "'a': planted" in err
    code, _, err = run(capsys, "generate", "a")
    assert code == 1
    assert "error: planted" in err


def test_chat_remembers(capsys, fake, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n/reset\nthree\n/help\n\n/exit\nnever\n"))
    code, out, err = run(capsys, "chat", "--system", "be brief")
    assert (code, out) == (0, " ONE\n TWO\n THREE\n")
    assert "/reset forgets" in err
    system, one = {"role": "system", "content": "be brief"}, {"role": "user", "content": "one"}
    assert fake[0].conversations == [
        [system, one],
        [system, one, {"role": "assistant", "content": " ONE"}, {"role": "user", "content": "two"}],
        [system, {"role": "user", "content": "three"}],
    ]


def test_chat_forgets_what_does_not_fit(capsys, fake, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a" * 30 + "\n" + "b" * 30 + "\n"))
    code, _, err = run(capsys, "chat")
    assert code == 0
    assert "the 1 oldest exchanges no longer fit" in err
    assert len(fake[0].conversations[1]) == 1


def test_chat_goes_on_after_what_it_cannot_take(capsys, fake, monkeypatch):
    stream_chat = FakeLLM.stream_chat

    def refusing(self, messages, params):
        if len(messages[-1]["content"]) > 100:
            raise ValueError("the prompt has more than max_model_len=100 tokens")
        return stream_chat(self, messages, params)

    monkeypatch.setattr(FakeLLM, "stream_chat", refusing)
    said = b"one\n" + b"a" * 200 + b"\nbad \xff byte\ntwo\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(said), encoding="utf-8"))
    code, out, err = run(capsys, "chat")
    assert (code, out) == (0, " ONE\n TWO\n")
    assert "evenflow: error: the prompt has more than max_model_len=100 tokens\n" in err
    assert "evenflow: error: the message is not valid UTF-8; say it again\n" in err
    assert "forgotten" not in err
    assert [message["content"] for message in fake[0].conversations[-1]] == ["one", " ONE", "two"]
    assert run(capsys, "chat", "-p", "a" * 200)[0] == 2


def test_ctrl_c_stops_the_answer_only(capsys, fake, monkeypatch):
    stream = FakeLLM.stream

    def interrupted(self, prompt, params):
        yield next(iter(stream(self, prompt, params)))
        if prompt == "one":
            raise KeyboardInterrupt

    monkeypatch.setattr(FakeLLM, "stream", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    code, _, err = run(capsys, "chat")
    assert code == 0
    assert "[stopped]" in err
    assert len(fake[0].conversations) == 2


def test_one_message(capsys, fake):
    assert run(capsys, "chat", "-p", "hi", "--temperature", "0")[:2] == (0, " HI\n")
    assert fake[0].params == SamplingParams(temperature=0.0, max_tokens=None)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate"], "no prompt"),
        (["generate", "x", "--max-seqs", "3"], "unknown option --max-seqs; did you mean --max-num-seqs?"),
        (["generate", "x", "--max-token", "3"], "did you mean --max-tokens?"),
        (["generate", "x", "--temperature", "hot"], "invalid float value: 'hot'"),
        (["generate", "x", "--temperature", "nan"], "temperature=nan must be a number"),
        (["generate", "x", "--top-p", "0"], "top_p=0.0 must be"),
        (["generate", "x", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["generate", "x", "--block-size", "0"], "block_size=0 must be"),
        (["generate", "--prompts-file", "/nowhere"], "--prompts-file /nowhere cannot be read"),
        (["generat", "x"], "unknown command 'generat'; did you mean generate?"),
        (["--verison"], "unknown option --verison; did you mean --version?"),
        (["bench", "ablation", "--output-dir", "x"], "unknown option --output-dir, which another kind of it takes"),
        (["zzz"], "unknown command 'zzz'. Commands are generate, chat"),
        (["chat", "--n", "2"], "unknown option --n"),
        (["plan"], "required: MODEL"),
        (["plan", "llama-2-7b", "--gpu", ""], "GPU '' is not listed. Known are a100-80gb"),
        (["plan", "llama-2-7b", "--gpu", "zzzz"], "GPU 'zzzz' is not listed. Known are a100-80gb"),
        (["plan", "llama-2-7b", "--gpu", "mi21"], "GPU 'mi21' is not listed; did you mean mi210?"),
        (["plan", "nonsense"], "'nonsense' does not exist"),
        (["plan", "llama-2-7b", "--gpu", "a100", "--max-model-len", "9999"], "exceeds the model's context of 4096"),
        (["plan", "qwen2.5-7b", "--gpu", "a100", "--gpus", "8"], "--gpus 8 must divide the model's 28"),
        (["plan", "llama-2-7b", "extra"], "unknown argument extra"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, fake, argv, message):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("evenflow: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_errors_of_the_engine_are_one_line(capsys, tmp_path):
    directory = make_checkpoint(tmp_path).directory
    edit_config(directory, logits_scaling=2.0)
    capsys.readouterr()
    code, out, err = run(capsys, "generate", "x", "--model", str(directory))
    assert (code, out) == (2, "")
    assert "logits_scaling=2.0 is not implemented for llama" in err
    assert err.count("\n") == 1


def test_explain_says_why(capsys):
    code, out, _ = run(capsys, "generate", "--explain", "--max-num-seqs", "9")
    assert code == 0
    settings = {line.split()[1]: line for line in out.splitlines() if line.startswith("│")}
    assert "asked for" in settings["max_num_seqs"]
    assert "the model's context" in settings["max_model_len"]
    assert len(settings) >= 15


def test_there_are_few_options():
    assert len(dataclasses.fields(EngineConfig)) <= 40
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert {name for name, *_ in SAMPLING} <= fields


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_has_examples(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"examples:\n  evenflow {command}" in out


def test_help_and_version(capsys):
    code, out, _ = run(capsys)
    assert code == 0
    assert run(capsys, "--help")[:2] == (0, out)
    assert all(command in out for command in COMMANDS)
    assert run(capsys, "--version")[1] == f"evenflow {evenflow.__version__}\n"


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["--version"],
        ["generate", "--help"],
        ["generate", "x", "--max-seqs", "3"],
        ["plan", "llama-2-7b", "--gpu", "h100"],
        ["plan", "demo"],
    ],
    ids=" ".join,
)
def test_no_torch_where_none_is_needed(argv):
    code = f"import sys; from evenflow.cli import main; main({argv!r}); print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "False"


def test_the_demo_tells_a_tale():
    argv = [
        sys.executable,
        "-m",
        "evenflow",
        "chat",
        "-p",
        "tell me the tale of the wolf and the lamb",
        "--temperature",
        "0",
    ]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert "Wolf" in done.stdout
    assert "Lamb" in done.stdout
    assert "tokens/s" in done.stderr
