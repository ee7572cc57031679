"""``--resume-from``: resume a run from a given checkpoint, its own or that of another run.

The driver makes the checkpoint the newest one of its stage, once, so the workers restore it like any other. A note in
the run folder records this, so that the same command, submitted again, resumes from the run's latest state instead.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from t2idist import storage
from t2idist.config import RunConfig
from t2idist.contract import System
from t2idist.engine.checkpoint import export
from t2idist.engine.checkpoint.format import (
    COMMIT,
    CorruptCheckpoint,
    images_of,
    list_committed,
    list_folders,
    read_marker,
)
from t2idist.engine.metrics import now
from t2idist.training.stages import RUN_ID, StageRun, run_url, stages_of

logger = logging.getLogger(__name__)

NOTE = "resumed_from.json"


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to resume from."""

    url: str
    stage: str
    images: int
    marker: Mapping[str, Any]
    """Content of its commit marker."""
    is_own: bool
    """Whether it belongs to this run."""
    exports: tuple[tuple[str, str], ...]
    """Exports of earlier stages to copy: (source URL, target URL)."""


def find(config: RunConfig, text: str) -> ResumePoint | None:
    """Find the checkpoint that ``--resume-from`` names: images seen in this run, or the folder of any run's checkpoint.

    Returns:
        None if the run has resumed from it before.

    Raises:
        ValueError: The checkpoint does not exist or cannot be used.
    """
    note = storage.join(run_url(config), NOTE)
    earlier = storage.read_json_if_present(note)
    if earlier is not None and earlier["asked"] == text:
        logger.info("already resumed from %s once (%s); resuming from the latest state", text, storage.redact(note))
        return None
    if text.isdigit():
        stage = _current_stage(config, text)
        url = _checkpoint_at(stage, int(text))
    else:
        url = storage.absolute(text).rstrip("/")
        stage = StageRun(config, url.split("/")[-3] if url.count("/") >= 3 else "")
        if stage.name not in config.stages or url.split("/")[-2] != "checkpoints":
            raise ValueError(
                f"--resume-from: {storage.redact(url)}: give images seen, or a checkpoint's folder: "
                f".../STAGE/checkpoints/IMAGES-ATTEMPT, with one of the stages {', '.join(config.stages)}"
            )
    try:
        marker = read_marker(url)
    except CorruptCheckpoint as error:
        raise ValueError(f"--resume-from: {error}") from None
    if not {"images", "config", "vocabulary"} <= marker.keys():
        raise ValueError(f"--resume-from: {storage.redact(url)}: not the checkpoint of a run")
    parent, _, folder = url.rpartition("/")
    is_own = parent == stage.checkpoints_url
    if stage.is_done():
        raise ValueError(f"--resume-from: stage {stage.name} of {config.name} is done; give name=ANOTHER for a new run")
    if not is_own and set(list_committed(stage.checkpoints_url)) - {folder}:  # from an interrupted copy
        raise ValueError(
            f"--resume-from: stage {stage.name} of {config.name} already has checkpoints; give name=ANOTHER for a new "
            "run"
        )
    exports = tuple(_exports_to_copy(stage, url.rsplit("/", 3)[0]))
    return ResumePoint(url, stage.name, marker["images"], marker, is_own, exports)


def _current_stage(config: RunConfig, text: str) -> StageRun:
    for stage in stages_of(config):
        if not stage.is_done():
            return stage
    raise ValueError(f"--resume-from: {text}: all stages of {config.name} are done; give name=ANOTHER for a new run")


def _checkpoint_at(stage: StageRun, images: int) -> str:
    folders = list_committed(stage.checkpoints_url)
    for folder in folders:
        if images_of(folder) == images:
            return storage.join(stage.checkpoints_url, folder)
    existing = ", ".join(f"{images_of(folder):,}" for folder in folders) or "none"
    raise ValueError(
        f"--resume-from: stage {stage.name} of {stage.config.name} has no checkpoint at {images:,} images; it has "
        f"{existing}"
    )


def _exports_to_copy(stage: StageRun, other_run: str) -> Iterator[tuple[str, str]]:
    """Yield (source URL, target URL) of the exports of earlier stages that this run lacks."""
    for earlier in stages_of(stage.config):
        if earlier == stage:
            return
        if earlier.is_done():
            continue
        source = storage.join(other_run, earlier.name, "export")
        if not export.exists(source):
            raise ValueError(
                f"--resume-from: stage {earlier.name} comes before {stage.name}, and neither {stage.config.name} nor "
                f"{storage.redact(other_run)} has its export"
            )
        yield source, earlier.export_url


def check(config: RunConfig, point: ResumePoint, system: System, vocabulary: list[str]) -> None:
    """Check that a checkpoint fits its stage's system and vocabulary. Raises ValueError."""
    url, marker, stage = storage.redact(point.url), point.marker, config.stages[point.stage]
    try:
        saved_stage = marker["config"]["stages"][point.stage]
    except (KeyError, TypeError):
        raise ValueError(f"--resume-from: {url} does not contain the configuration that it was trained with") from None
    for key in ("system", "group_size", "groups"):
        if saved_stage[key] != getattr(stage, key):
            raise ValueError(
                f"--resume-from: {url} was trained with stages.{point.stage}.{key}={saved_stage[key]}; here it is "
                f"{getattr(stage, key)}"
            )
    if marker["vocabulary"] != vocabulary:
        raise ValueError(
            f"--resume-from: {url} has another vocabulary ({len(marker['vocabulary'])} words) than this data "
            f"({len(vocabulary)} words)"
        )
    for role_name, role in system.roles.items():
        for key, value in role.net.state_dict().items():
            saved = marker["tensors"].get(f"{role_name}/net/{key}")
            if saved is None or saved["shape"] != list(value.shape):
                shape = "missing" if saved is None else f"{saved['shape']}"
                raise ValueError(
                    f"--resume-from: {url}: '{role_name}/net/{key}' is {shape} there and {list(value.shape)} in this "
                    "configuration"
                )
    if stage.images <= point.images:
        raise ValueError(
            f"--resume-from: {url} has seen {point.images:,} images, and stages.{point.stage}.images is "
            f"{stage.images:,}"
        )


def prepare(config: RunConfig, text: str, point: ResumePoint) -> None:
    """Make the checkpoint the newest of its stage. Newer checkpoints of the run itself are removed."""
    checkpoints = StageRun(config, point.stage).checkpoints_url
    storage.remove(storage.join(run_url(config), RUN_ID))  # a new id, so that no replica in memory is newer
    for source, target in point.exports:
        storage.copy_folder(source, target, last=export.INDEX)
    folder = point.url.rpartition("/")[2]
    if point.is_own:
        newer = [name for name in list_folders(checkpoints) if name > folder]
        for name in newer:
            storage.remove(storage.join(checkpoints, name))
        logger.info(
            "stage %s returns to %s images; removed %d newer checkpoints", point.stage, point.images, len(newer)
        )
    else:
        storage.copy_folder(point.url, storage.join(checkpoints, folder), last=COMMIT)
    note = {"asked": text, "checkpoint": storage.redact(point.url), "images": point.images, "time": now()}
    storage.write_json(storage.join(run_url(config), NOTE), note)
