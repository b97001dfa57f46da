"""What replicas need besides Ray: their options, the part of a request that routes it, their metrics as one page."""

import json

import pytest
from prometheus_client.parser import text_string_to_metric_families

from evenflow.cli import main
from evenflow.ray import running
from evenflow.ray.call import ROUTED_CHARS, HttpCall, prompt_beginning
from evenflow.ray.config import ReplicaConfig, configs_from
from evenflow.ray.merging import merge_metrics
from evenflow.server.metrics import Metrics


def test_options_come_as_text_or_as_what_they_are():
    engine, server, replicas = configs_from(
        {"model": "demo", "max_num_seqs": "8", "access_log": "no", "drain_timeout": "2.5", "replicas": 3, "port": 9}
    )
    assert (engine.model, engine.max_num_seqs) == ("demo", 8)
    assert (server.access_log, server.drain_timeout, server.port) == (False, 2.5, 9)
    assert replicas == ReplicaConfig(replicas=3)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"replica": "2"}, "unknown option 'replica'; did you mean replicas?"),
        ({"max_num_seqs": "many"}, "max_num_seqs='many' must be of type int"),
        ({"access_log": "maybe"}, "access_log='maybe' must be of type bool"),
        ({"replicas": "0"}, "replicas=0 must be at least 1"),
        ({"replicas": "3", "max_replicas": "2"}, "max_replicas=2 must be at least 3"),
        ({"cpus_per_replica": "nan"}, "cpus_per_replica=nan must be at least 0"),
        ({"gpus_per_replica": "-1"}, "gpus_per_replica=-1 must be at least 0"),
    ],
)
def test_a_wrong_option_is_named(args, message):
    with pytest.raises(ValueError) as error:
        configs_from(args)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--replicas", "0"], "replicas=0 must be at least 1"),
        (["--max-replicas", "2"], "--max-replicas is for replicas on Ray; add --replicas N"),
    ],
)
def test_the_command_line_refuses(args, message, capsys):
    assert main(["serve", *args]) == 2
    assert message in capsys.readouterr().err


def test_without_ray_one_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(running, "find_spec", lambda name: None)
    assert main(["serve", "--replicas", "2"]) == 2
    assert capsys.readouterr().err == (
        'evenflow: error: --replicas needs Ray, which is not installed; run: pip install "evenflow[ray]"\n'
    )


def beginning(**body):
    return prompt_beginning(json.dumps(body).encode())


def test_prompts_that_begin_alike_are_routed_by_the_same_text():
    long = "Once upon a time " * 1000
    assert beginning(prompt=long + "a") == beginning(prompt=long + "b") == long[:ROUTED_CHARS]
    system = {"role": "system", "content": "You tell tales."}
    one = beginning(messages=[system, {"role": "user", "content": "the wolf"}], model="demo")
    other = beginning(messages=[system, {"role": "user", "content": [{"type": "text", "text": "the lamb"}]}])
    assert one == "systemYou tell tales.userthe wolf"
    assert other == "systemYou tell tales.userthe lamb"
    assert beginning(input="a tale") == "a tale"
    assert beginning(prompt=[1, 22, 3]) == "1 22 3 " != beginning(prompt=[12, 2, 3])
    assert beginning(prompt="a", cache_salt="mine") != beginning(prompt="a")  # they share no cache


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"prompt": null}', b'{"model": "demo"}', b"[" * 10000, b"\xff"])
def test_a_body_without_a_prompt_is_routed_by_none(body):
    assert prompt_beginning(body) == ""


def test_a_deep_prompt_costs_nothing():
    assert prompt_beginning(b'{"prompt": ' + b"[" * 500 + b'"a"' + b"]" * 500 + b"}") == ""


def test_a_call_is_the_request_that_it_was_made_of():
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"a=b",
        "headers": [(b"host", b"localhost"), (b"authorization", b"Bearer key")],
        "client": ["127.0.0.1", 5],
    }
    again = HttpCall.of(scope, b'{"prompt": "a"}').scope()
    assert {name: again[name] for name in ("type", "method", "path", "query_string", "headers")} == {
        name: scope[name] for name in ("type", "method", "path", "query_string", "headers")
    }
    assert again["client"] == ("127.0.0.1", 5)
    assert again["state"] == {}


def test_metrics_of_replicas_become_one_page():
    pages, total = {}, {}
    for replica, prompts in (("one", [10, 20]), ("two", [5])):
        metrics = Metrics("demo")
        for length in prompts:
            metrics.request_started(length)
            metrics.request_finished("stop", 1.0, length, 2, 0)
        pages[replica] = metrics.render()[0].decode()
        total[replica] = sum(prompts)
    families = {family.name: family for family in text_string_to_metric_families(merge_metrics(pages).decode())}
    alone = {family.name: family for family in text_string_to_metric_families(pages["one"])}
    assert families.keys() == alone.keys()
    for name, family in families.items():
        assert (family.type, family.documentation) == (alone[name].type, alone[name].documentation)
        mine = [s for s in family.samples if s.labels["replica"] == "one"]
        stripped = [(s.name, {k: v for k, v in s.labels.items() if k != "replica"}, s.value) for s in mine]
        assert stripped == [(s.name, s.labels, s.value) for s in alone[name].samples]
    found = {s.labels["replica"]: s.value for s in families["evenflow_prompt_tokens"].samples}
    assert found == total
