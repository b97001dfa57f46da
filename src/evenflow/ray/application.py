"""The deployments and how they are placed, scaled and replaced, as Ray Serve is told. Starts nothing."""

import logging
from importlib import import_module
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from evenflow.config import EngineConfig
from evenflow.ray.config import ReplicaConfig
from evenflow.ray.endpoint import Endpoint
from evenflow.ray.replica import EngineReplica
from evenflow.server.config import ServerConfig

logger = logging.getLogger("evenflow")

# Over Ray's own, whose public name, ray.serve.llm.request_router, cannot be imported without vLLM or SGLang.
PREFIX_ROUTER = "evenflow.ray.routing.PrefixRouter"
PREFIX_ROUTER_OPTIONS = {
    "imbalanced_threshold": 16,  # requests between the fullest and the emptiest replica: beyond, balance comes first
    "do_eviction": True,  # of the router's memory of prompts, which has no limit otherwise
}
HEALTH_PERIOD_S = 5.0
HEALTH_TIMEOUT_S = 10.0
NUM_START_TRIES = 3  # a model that cannot be loaded cannot be loaded the twentieth time either
OUR_OWN_LOG = {"enable_access_log": False}  # the replicas write the server's access log
CLOSE_S = 10.0  # beyond --drain-timeout, for the engine's process to end


def build(engine: EngineConfig, server: ServerConfig, config: ReplicaConfig) -> Any:
    """The application, for serve.run. Needs the files of the model on the replicas' hosts only."""
    is_prefix_aware = config.prefix_aware and has_prefix_router()
    engines = serve.deployment(
        EngineReplica,
        name="Engine",
        logging_config=OUR_OWN_LOG,
        **deployment_options(engine, server, config, is_prefix_aware),
    )
    endpoint = serve.deployment(
        serve.ingress()(Endpoint),
        name="Endpoint",
        logging_config=OUR_OWN_LOG,
        max_ongoing_requests=100_000,  # the engines' limits are the ones that count
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=server.drain_timeout + CLOSE_S,
    )
    return endpoint.bind(engines.bind(engine, server), server, is_prefix_aware)


def deployment_options(
    engine: EngineConfig, server: ServerConfig, config: ReplicaConfig, is_prefix_aware: bool
) -> dict[str, Any]:
    """What Ray is told about the engines."""
    num_gpus = config.gpus_per_replica
    if num_gpus is None:
        is_on_gpu = engine.device == "cuda" or (engine.device == "auto" and cluster_has_gpus())
        num_gpus = engine.tensor_parallel_size if is_on_gpu else 0
    resources = {"CPU": config.cpus_per_replica, "GPU": num_gpus}
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": config.cpus_per_replica, "num_gpus": num_gpus},
        "max_ongoing_requests": config.max_ongoing_requests,
        "max_queued_requests": server.max_queue,
        "health_check_period_s": HEALTH_PERIOD_S,
        "health_check_timeout_s": HEALTH_TIMEOUT_S,
        "graceful_shutdown_timeout_s": server.drain_timeout + CLOSE_S,
        "max_constructor_retry_count": NUM_START_TRIES,
    }
    if num_gpus > 1:
        # One bundle is on one host: the engine's ranks are processes there, and see all of the actor's GPUs.
        options["placement_group_bundles"] = [resources]
        options["placement_group_strategy"] = "STRICT_PACK"
    if config.max_replicas is None:
        options["num_replicas"] = config.replicas
    else:
        options["autoscaling_config"] = AutoscalingConfig(
            min_replicas=config.replicas,
            initial_replicas=config.replicas,
            max_replicas=config.max_replicas,
            target_ongoing_requests=config.target_ongoing_requests,
        )
    if is_prefix_aware:
        options["request_router_config"] = RequestRouterConfig(
            request_router_class=PREFIX_ROUTER, request_router_kwargs=PREFIX_ROUTER_OPTIONS
        )
    return options


def cluster_has_gpus() -> bool:
    """Raises ValueError if there is no cluster to ask."""
    if ray.is_initialized():
        return bool(ray.cluster_resources().get("GPU", 0) > 0)
    try:
        ray.init(address="auto", configure_logging=False, log_to_driver=False)  # `serve run` connects after this
    except ConnectionError:
        raise ValueError("no Ray runs here that could be asked for GPUs; start it, or say device=cpu") from None
    try:
        return cluster_has_gpus()
    finally:
        ray.shutdown()


def has_prefix_router() -> bool:
    """Whether this version of Ray has it where we look for it."""
    module, _, name = PREFIX_ROUTER.rpartition(".")
    try:
        return hasattr(import_module(module), name)
    except ImportError:
        logger.warning("this version of Ray has no router that knows prefixes; requests go to the less busy replica")
        return False
