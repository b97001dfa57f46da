"""The commands of docs/ray.md on a cluster of their own: `ray start`, `serve run`, an update and scaling under load."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

DEADLINE_S = 120
ARGS = {"model": "demo", "device": "auto", "host": "127.0.0.1", "cpus_per_replica": 1}
SCALING = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2}
QUICK = {"upscale_delay_s": 1, "downscale_delay_s": 1, "look_back_period_s": 3, "metrics_interval_s": 1}
NUM_CLIENTS = 6


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class Cluster:
    """One node, with logical CPUs and GPUs, and the commands that talk to it."""

    def __init__(self, directory):
        gcs, self.dashboard, client, agent, self.http = free_ports(5)
        self.url = f"http://127.0.0.1:{self.http}"
        self.directory = directory
        self.env = os.environ | {
            "HOME": str(directory),
            "RAY_ADDRESS": f"127.0.0.1:{gcs}",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.dashboard}",
            "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{self.dashboard}",
            "RAY_AUTH_MODE": "token",
            "OMP_NUM_THREADS": "1",
        }
        self.run("ray", "get-auth-token", "--generate")
        self._headers = {"Authorization": "Bearer " + (directory / ".ray" / "auth_token").read_text().strip()}
        resources = ("--num-cpus", "2", "--num-gpus", "2", "--object-store-memory", str(10**8))
        ports = ("--port", str(gcs), "--dashboard-port", str(self.dashboard), "--ray-client-server-port", str(client))
        ports += ("--dashboard-agent-listen-port", str(agent), "--node-ip-address", "127.0.0.1")
        self.process = subprocess.Popen(
            [command("ray"), "start", "--head", "--block", "--temp-dir", str(directory / "ray"), *resources, *ports],
            env={name: value for name, value in self.env.items() if name != "RAY_ADDRESS"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def run(self, *args, code=0):
        """What the command writes."""
        done = subprocess.run(
            [command(args[0]), *args[1:]], env=self.env, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def deploy(self, name, **more):
        """`serve deploy` of docs/ray.md's file."""
        application = {"name": "evenflow", "route_prefix": "/", "import_path": "evenflow.ray:app"} | more
        http = {"host": "127.0.0.1", "port": self.http}
        (self.directory / name).write_text(json.dumps({"http_options": http, "applications": [application]}))
        self.run("serve", "deploy", str(self.directory / name))

    def ask(self, path):
        """What the dashboard says, None while it does not."""
        try:
            answer = httpx.get(f"http://127.0.0.1:{self.dashboard}{path}", headers=self._headers, timeout=DEADLINE_S)
        except httpx.TransportError:
            return None
        return answer.json() if answer.status_code == 200 else None

    def application(self):
        return self.ask("/api/serve/applications/")["applications"].get("evenflow", {"status": "none"})

    def is_running(self):
        status = self.application()["status"]
        assert status != "DEPLOY_FAILED", self.application()
        return status == "RUNNING"

    def engines(self):
        """The states of the engines' replicas."""
        return [replica["state"] for replica in self.application()["deployments"]["Engine"]["replicas"]]

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(60)
        finally:
            self.process.kill()


def command(name):
    return str(Path(sys.executable).with_name(name))


def poll(is_true, what):
    """Asks until it is so; a pause between, for what is asked about needs the CPU more."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if is_true():
            return
        time.sleep(0.2)
    raise AssertionError(f"{what} did not come true in {DEADLINE_S} s")


@pytest.fixture(scope="module")
def cluster():
    directory = Path(tempfile.mkdtemp(prefix="ef"))  # a short path: Ray's sockets are in it
    cluster = Cluster(directory)
    try:
        poll(lambda: cluster.ask("/api/version"), "a dashboard")
        cluster.run("serve", "start", "--http-host", "127.0.0.1", "--http-port", str(cluster.http))
        options = [f"{name}={value}" for name, value in ARGS.items()]
        cluster.run("serve", "run", "--non-blocking", "--name", "evenflow", "evenflow.ray:app", *options)
        poll(cluster.is_running, "the application")
        yield cluster
        cluster.run("serve", "shutdown", "--yes")
    finally:
        cluster.close()
        shutil.rmtree(directory)


@contextlib.contextmanager
def load(cluster, num_clients):
    """So many requests at a time, streamed and whole, while it lasts. Yields the answers; each must be whole."""
    is_over = threading.Event()
    answers = []

    def ask(number):
        body = {"prompt": f"Once upon a time {number}", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
        with httpx.Client(base_url=cluster.url, timeout=DEADLINE_S) as client:
            while not is_over.is_set():
                if number % 2:
                    answer = client.post("/v1/completions", json=body).json()
                    assert "choices" in answer, answer
                    answers.append((answer["model"], number, answer["choices"][0]["text"]))
                    continue
                text = client.post("/v1/completions", json=body | {"stream": True}).text
                events = [line.removeprefix("data: ") for line in text.splitlines() if line]
                assert events[-1] == "[DONE]", text
                parts = [json.loads(event) for event in events[:-1]]
                assert all("choices" in part for part in parts), text
                answers.append((parts[0]["model"], number, "".join(part["choices"][0]["text"] for part in parts)))

    with ThreadPoolExecutor(num_clients) as threads:
        asked = [threads.submit(ask, number) for number in range(num_clients)]
        try:
            poll(lambda: answers or any(future.done() for future in asked), "an answer")
            yield answers
        finally:
            is_over.set()
        for future in asked:
            future.result(DEADLINE_S)
    assert len(set(answers)) == len({answer[:2] for answer in answers})  # a version has one answer to a prompt


def test_serve_run_reserves_gpus_and_is_not_joined(cluster):
    """`serve run` builds the application before it connects, and must ask the cluster for GPUs all the same."""
    config = cluster.application()["deployments"]["Engine"]["deployment_config"]
    assert config["ray_actor_options"]["num_gpus"] == 1
    refused = cluster.run("evenflow", "serve", "demo", "--replicas", "1", "--port", "0", code=2)
    assert "Ray Serve runs on this cluster already" in refused
    assert cluster.is_running()


def test_an_update_and_scaling_lose_no_request(cluster):
    """A file takes over from `serve run`, adds a replica as requests queue, and removes it when they no longer do."""
    args = ARGS | {
        "device": "cpu",
        "served_model_name": "updated",
        "replicas": 1,
        "max_replicas": 2,
        "target_ongoing_requests": 2,
    }
    with load(cluster, 1) as few:
        with load(cluster, NUM_CLIENTS) as many:
            cluster.deploy(
                "evenflow.yaml", args=args, deployments=[{"name": "Engine", "autoscaling_config": SCALING | QUICK}]
            )
            poll(lambda: many[-1][0] == few[-1][0] == "updated", "an answer of the new version")
            poll(lambda: cluster.is_running() and cluster.engines() == ["RUNNING"] * 2, "a second replica")
        assert {name for name, *_ in many} == {"demo", "updated"}
        poll(lambda: cluster.engines() == ["RUNNING"], "one replica again")
    for start in "ABCDEFGH":  # prompts that no replica has seen
        body = {"prompt": f"{start} new one", "max_tokens": 1}
        assert httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=DEADLINE_S).status_code == 200
