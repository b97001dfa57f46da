"""Ray's router that knows prefixes, with a memory of its own. Needs that router where this version of Ray has it."""

from typing import Any

from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router import PrefixCacheAffinityRouter
from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_tree import PrefixTreeActor


class PrefixRouter(PrefixCacheAffinityRouter):  # type: ignore[misc]  # Ray's has no types
    """Remembers prompts for the replicas that this router itself knows.

    Ray keeps one memory for all routers of an application, present and past. A replica that left while the router was
    being replaced is never taken out of it, the router that comes next chooses it for every new prompt, fails on it,
    and the request waits for ever.
    """

    def initialize_state(self, **options: Any) -> None:
        """The memory ends with this process, takes no CPU that a replica may have reserved, and may be lost."""
        tree = PrefixTreeActor.options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
        super().initialize_state(tree_actor=tree, **options)
