"""The application in a Ray of this process: how it is described to Ray, and a rolling update under load."""

import contextlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import ray
from ray import serve
from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_tree import PrefixTreeActor

from evenflow.config import EngineConfig
from evenflow.ray import app
from evenflow.ray.application import deployment_options, has_prefix_router
from evenflow.ray.config import ReplicaConfig
from evenflow.server.config import ServerConfig

DEADLINE_S = 120
ARGS = {"model": "demo", "device": "cpu", "replicas": 1, "cpus_per_replica": 0.5, "max_num_seqs": 32}


def options(device="cpu", is_prefix_aware=False, ranks=1, **replicas):
    engine, server = EngineConfig(device=device, tensor_parallel_size=ranks), ServerConfig(drain_timeout=3)
    return deployment_options(engine, server, ReplicaConfig(**replicas), is_prefix_aware)


def test_replicas_are_placed_by_their_gpus():
    assert options("cpu")["ray_actor_options"] == {"num_cpus": 1.0, "num_gpus": 0}
    assert options("cuda")["ray_actor_options"] == {"num_cpus": 1.0, "num_gpus": 1}
    assert "placement_group_bundles" not in options("cuda")
    four = options("cuda", gpus_per_replica=4, cpus_per_replica=8)
    assert four["placement_group_bundles"] == [{"CPU": 8, "GPU": 4}]
    assert four["placement_group_strategy"] == "STRICT_PACK"
    assert options("cuda", ranks=2)["placement_group_bundles"] == [{"CPU": 1.0, "GPU": 2}]
    assert options("cpu", ranks=2)["ray_actor_options"]["num_gpus"] == 0


def test_their_number_is_fixed_or_follows_the_queue():
    assert options(replicas=3)["num_replicas"] == 3
    scaled = options(replicas=2, max_replicas=5, target_ongoing_requests=9)
    assert "num_replicas" not in scaled
    config = scaled["autoscaling_config"]
    assert (config.min_replicas, config.max_replicas, config.target_ongoing_requests) == (2, 5, 9)


def test_ray_accepts_what_it_is_told():
    """All options at once, by Ray's own checks."""
    told = options("cuda", True, replicas=2, max_replicas=5, gpus_per_replica=2)
    assert serve.deployment(object, name="Engine", **told).name == "Engine"


def test_rays_own_router_is_where_we_look_for_it():
    assert has_prefix_router()


@pytest.fixture(scope="module")
def url():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    ray.init(address="local", num_cpus=4, object_store_memory=10**8, include_dashboard=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def test_an_update_loses_no_request(url):
    """Requests go on while another version takes over: all are answered, in the end by the new one."""
    serve.run(app(ARGS), name="evenflow")
    is_over = threading.Event()
    under_way = threading.Semaphore(0)

    def ask():
        """One after the other until the update is over."""
        answers = []
        with httpx.Client(base_url=url, timeout=DEADLINE_S) as client:
            while not is_over.is_set():
                body = {"prompt": "Once upon a time", "max_tokens": 32, "temperature": 0}
                response = client.post("/v1/completions", json=body)
                answers.append((response.status_code, response.json()))
                under_way.release()
        return answers

    with ThreadPoolExecutor(2) as threads, contextlib.ExitStack() as at_end:
        at_end.callback(is_over.set)
        asked = [threads.submit(ask) for _ in range(2)]
        assert under_way.acquire(timeout=DEADLINE_S)
        serve.run(app(ARGS | {"served_model_name": "renamed"}), name="evenflow")
        is_over.set()
        answers = [answer for future in asked for answer in future.result(DEADLINE_S)]
    assert {status for status, _ in answers} == {200}
    assert len({answer["choices"][0]["text"] for _, answer in answers}) == 1
    assert {answer["model"] for _, answer in answers} >= {"demo"}
    assert httpx.get(f"{url}/v1/models", timeout=DEADLINE_S).json()["data"][0]["id"] == "renamed"


def test_a_replica_of_the_past_is_not_chosen(url):
    """Ray's memory of prompts outlives a router that has been replaced, and so do replicas in it that have left since.

    A prompt like none before goes to the replica with the fewest, which would be that one.
    """
    place = {"name": "LlmPrefixTreeActor", "namespace": "serve::evenflow::Engine"}
    tree = PrefixTreeActor.options(num_cpus=0, get_if_exists=True, **place).remote()
    ray.get(tree.add_tenants.remote(["SERVE_REPLICA::evenflow#Engine#departed"], 0.0))
    serve.run(app(ARGS | {"served_model_name": "renamed"}), name="evenflow")
    for start in "ABCD":
        body = {"prompt": f"{start} prompt like none before", "max_tokens": 1}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=DEADLINE_S).status_code == 200
