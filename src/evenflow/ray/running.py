"""`evenflow serve --replicas N`: joins this machine's Ray, or starts one, and serves until a signal."""

import logging
import os
import signal
import socket
import threading
from importlib.util import find_spec
from typing import Any

from evenflow.config import EngineConfig
from evenflow.engine.opening import open_model
from evenflow.ray.config import ReplicaConfig
from evenflow.server.config import ServerConfig
from evenflow.server.serving import bind, configure_logging, default_model_name

logger = logging.getLogger("evenflow")

APP_NAME = "evenflow"
OBJECT_STORE_BYTES = 100 * 10**6  # of a Ray of our own; an answer travels in messages, so little is stored


def require_ray() -> None:
    """Raises ValueError that says how to get it."""
    if find_spec("ray") is None or find_spec("ray.serve") is None:
        raise ValueError('--replicas needs Ray, which is not installed; run: pip install "evenflow[ray]"')


def serve_replicas(engine: EngineConfig, server: ServerConfig, config: ReplicaConfig) -> int:
    """Serve until a signal, and return the exit code: 0 after a signal, 1 if the replicas cannot be started.

    Raises ValueError or OSError for what is wrong before anything is started.
    """
    require_ray()
    server.api_keys()
    open_model(engine)
    port = free_port(server)
    import ray
    from ray import serve

    from evenflow.ray.application import build

    stopping = threading.Event()
    join_or_start(config)
    if serve.status().proxies:  # their address is set, and what else they serve would end with us
        ray.shutdown()
        raise ValueError(
            "Ray Serve runs on this cluster already; deploy with 'serve run --non-blocking --name evenflow "
            "evenflow.ray:app model=...', or set RAY_ADDRESS=local for a Ray of its own"
        )
    for number in (signal.SIGTERM, signal.SIGINT):  # Ray has set its own
        signal.signal(number, lambda *_: stopping.set())
    try:
        serve.start(http_options={"host": server.host, "port": port})
        serve.run(build(engine, server, config), name=APP_NAME, route_prefix="/")
        configure_logging(server)  # Ray has changed it
        name = server.served_model_name or default_model_name(engine.model)
        count = f"{config.replicas} replicas" if config.replicas > 1 else "1 replica"
        logger.info("ready: %s on http://%s:%d (%s on Ray, API under /v1)", name, server.host, port, count)
        stopping.wait()
        logger.info("stopping: running requests may take up to %g s more", server.drain_timeout)
        serve.delete(APP_NAME)
    except RuntimeError as error:
        logger.error("error: the replicas could not be started: %s", error)
        return 1
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0


def join_or_start(config: ReplicaConfig) -> None:
    """The cluster of RAY_ADDRESS or of `ray start`; with RAY_ADDRESS=local or without one, a Ray that ends with us."""
    import ray

    options: dict[str, Any] = {"configure_logging": False, "log_to_driver": True}
    try:
        if os.environ.get("RAY_ADDRESS") == "local":
            raise ConnectionError
        ray.init(address="auto", **options)
    except ConnectionError:
        # Ray counts CPUs, it does not bind them: too few of them would leave replicas waiting for ever.
        needed = int(config.cpus_per_replica * (config.max_replicas or config.replicas)) + 1
        ray.init(
            address="local",
            num_cpus=max(needed, os.cpu_count() or 1),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            **options,
        )


def free_port(server: ServerConfig) -> int:
    """The port, if nobody has it; Ray would only say so in a log. Raises OSError."""
    listener: socket.socket = bind(server.host, server.port)
    with listener:
        port: int = listener.getsockname()[1]
        return port
