"""Policy: who computes how many tokens next, in which blocks. Knows counts and block ids, and no tensor."""

from evenflow.scheduler.block_pool import BlockPool as BlockPool
from evenflow.scheduler.scheduler import Scheduler as Scheduler
