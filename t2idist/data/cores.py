"""Threads beside the training, which computes on all cores that its process has."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch


def single_threaded_pool(threads: int, name: str) -> ThreadPoolExecutor:
    """A pool of threads in each of which torch computes on one core.

    With more, each thread gets OpenMP helpers of its own; where these outnumber the cores, all of the process's go to
    sleep after every operation instead of waiting for the next, and the training is a quarter slower by their waking.
    """
    torch.get_num_threads()  # the calling thread takes its own number now; at a later first use it would be 1
    return ThreadPoolExecutor(threads, name, initializer=torch.set_num_threads, initargs=(1,))
