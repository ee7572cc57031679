"""The worker processes of a run's first group; on a cluster that the run joins they start before it imports torch."""

from __future__ import annotations

import os

from t2idist import storage
from t2idist.config import ClusterConfig, RunConfig
from t2idist.launch import connection, resources
from t2idist.launch.worker_pool import WorkerPool
from t2idist.observability.process import COMMIT_VARIABLE
from t2idist.training.allocator import allocator_settings


def start_pool(config: RunConfig, own_cluster: bool) -> WorkerPool:
    """Return the pool of a run; the processes of its first group load already, if there is room for them.

    Args:
        own_cluster: The cluster was started for this run alone.
    """
    cluster = config.cluster
    commit = {COMMIT_VARIABLE: os.environ[COMMIT_VARIABLE]} if COMMIT_VARIABLE in os.environ else {}
    memory = allocator_settings() if cluster.gpus_per_worker else {}
    pool = WorkerPool(
        {**memory, **connection.thread_settings(cluster), **commit},
        cluster.spare_processes(own_cluster),
        cluster.start_seconds,
        keeps_processes=config.strategy != "deepspeed",
        run_url=storage.join(config.storage, config.name),  # without the module `stages`, which imports torch
        systems=[stage.system for stage in config.stages.values()],
    )
    start_first(pool, cluster)
    return pool


def start_first(pool: WorkerPool, cluster: ClusterConfig) -> None:
    """Start the processes of the first group, unless they have been."""
    pool.start_first(resources.worker_slots(resources.per_worker(cluster)), cluster.workers)
