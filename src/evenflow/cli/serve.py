"""Serve a model over the OpenAI API, with a page to look at. Without MODEL, the built-in demo model."""

import argparse

from evenflow.cli.options import add_engine_options, add_options, engine_config, explain, given
from evenflow.ray.config import ReplicaConfig
from evenflow.server.config import ServerConfig

EXAMPLES = """examples:
  evenflow serve
  evenflow serve Qwen/Qwen3-0.6B --port 8000
  evenflow serve ./my-model --host 0.0.0.0 --api-key-file keys.txt --log-format json
  evenflow serve ./my-model --replicas 2    # needs pip install "evenflow[ray]"

then:
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
       -d '{"prompt": "Once upon a time", "max_tokens": 50}'
and open http://127.0.0.1:8000 in a browser."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "engine_model", nargs="?", metavar="MODEL", help="directory or Hugging Face name", default="demo"
    )
    add_options(parser.add_argument_group("server"), ServerConfig, "server_")
    add_options(parser.add_argument_group("replicas, on Ray"), ReplicaConfig, "ray_")
    add_engine_options(parser, leave_out=("model",))


def run(args: argparse.Namespace) -> int:
    engine, server = engine_config(args), ServerConfig(**given(args, "server_"))
    replicas = given(args, "ray_")
    replica_config = ReplicaConfig(**replicas)
    if replicas and "replicas" not in replicas:
        raise ValueError(f"--{next(iter(replicas)).replace('_', '-')} is for replicas on Ray; add --replicas N")
    if args.explain:
        return explain(engine, is_offline=False)
    from evenflow.server.serving import configure_logging, serve

    configure_logging(server)
    if replicas:
        from evenflow.ray.running import serve_replicas

        return serve_replicas(engine, server, replica_config)
    return serve(engine, server)
