"""One job of a Ray cluster trains a run: a second submission is refused while the driver of the first one lives.

Ctrl-C of ``ray job submit`` ends only the output, so that the same command may be submitted while the job continues.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import ray

from t2idist import storage
from t2idist.config import RunConfig
from t2idist.launch import ray_internals
from t2idist.training.lifecycle import run_is_taken
from t2idist.training.stages import run_url

JOB = "job.json"
"""The job that trains the run: Ray's session and job id, and the id of its submission."""
_GRACE_SECONDS = 15.0
"""By then Ray has noticed that a driver was killed."""
_POLL_SECONDS = 0.5
_SUBMISSION_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it for the command of `ray job submit`."""


@contextlib.contextmanager
def only_one(config: RunConfig) -> Iterator[None]:
    """Record this Ray job as the one that trains the run while the block runs.

    Raises:
        RunIsTaken: A living job of this cluster trains the run.
    """
    url, context = storage.join(run_url(config), JOB), ray.get_runtime_context()
    mine = {"session": context.get_session_name(), "job": context.get_job_id(), "submission": _submission()}
    holder = storage.read_json_if_present(url) or {}
    deadline = time.monotonic() + _GRACE_SECONDS
    while _lives(holder, mine):
        if time.monotonic() > deadline:
            raise run_is_taken(config, _name(holder))
        time.sleep(_POLL_SECONDS)
    storage.write_json(url, mine)
    try:
        yield
    finally:
        storage.remove(url)


def _lives(holder: Mapping[str, Any], mine: Mapping[str, Any]) -> bool:
    """Return whether the holder is another job of this cluster whose driver has not ended."""
    if holder.get("session") != mine["session"] or holder["job"] == mine["job"]:
        return False
    return any(job["JobID"] == holder["job"] and not job["IsDead"] for job in ray_internals.state.job_table())


def _submission() -> str:
    """Return the id that `ray job submit` gave this job, or nothing if it was started by hand."""
    settings = json.loads(os.environ.get(_SUBMISSION_VARIABLE) or "{}")
    return str(settings.get("metadata", {}).get("job_submission_id", ""))


def _name(holder: Mapping[str, Any]) -> str:
    name = holder.get("submission")
    return (
        f"the Ray job {name} (ray job logs --follow {name}; ray job stop {name})"
        if name
        else f"the Ray job {holder['job']}"
    )
