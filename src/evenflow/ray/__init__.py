"""Replicas of the engine on Ray Serve, on one machine or several: `serve run evenflow.ray:app model=...`.

Owns how a request finds a replica, what becomes of it when the replica dies, and how replicas are placed. What is
answered is the server's: every replica runs the same routes as `evenflow serve`. Needs the extra `ray`.
"""

from collections.abc import Mapping
from typing import Any


def app(args: Mapping[str, Any]) -> Any:
    """The Ray Serve application. args: options of the engine, the server and the replicas, by name.

    Raises ValueError that names the option.
    """
    from evenflow.ray.application import build
    from evenflow.ray.config import configs_from

    return build(*configs_from(args))
