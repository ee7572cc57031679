"""``--resume-from``: a run goes on from a checkpoint that is named, of its own or of another run.

The driver puts the checkpoint where the workers find the newest one, once; from there on the run is as any other. A
note in the run's folder says that it is done, so that the same command, submitted again, goes on from where it was.
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
from t2idist.training import stages

logger = logging.getLogger(__name__)

NOTE = "resumed_from.json"


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to go on from. own: it is one of the stage's own. exports: of earlier stages, to bring along."""

    url: str
    stage: str
    images: int
    marker: Mapping[str, Any]
    own: bool
    exports: tuple[tuple[str, str], ...]


def find(config: RunConfig, text: str) -> ResumePoint | None:
    """The checkpoint that ``--resume-from`` names: images seen, in this run, or the folder of any run's checkpoint.

    None where the run has gone on from it before. Raises ValueError for one that is not there or cannot be used.
    """
    note = storage.join(stages.run_url(config), NOTE)
    if storage.exists(note) and storage.read_json(note)["asked"] == text:
        logger.info("the run has gone on from %s before; it goes on from where it is (%s)", text, storage.redact(note))
        return None
    if text.isdigit():
        stage = _present_stage(config, text)
        url = _by_images(config, stage, int(text))
    else:
        url = storage.absolute(text).rstrip("/")
        stage = url.split("/")[-3] if url.count("/") >= 3 else ""
        if stage not in config.stages or url.split("/")[-2] != "checkpoints":
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
    checkpoints = storage.join(stages.stage_url(config, stage), "checkpoints")
    own = url.rpartition("/")[0] == checkpoints
    if export.exists(stages.export_url(config, stage)):
        raise ValueError(f"--resume-from: stage {stage} of {config.name} is done; give name=ANOTHER for a new run")
    if not own and set(list_committed(checkpoints)) - {url.rpartition("/")[2]}:  # a copy may have been cut off
        raise ValueError(
            f"--resume-from: stage {stage} of {config.name} has checkpoints of its own; give name=ANOTHER for a new run"
        )
    theirs = url.rsplit("/", 3)[0]
    return ResumePoint(url, stage, marker["images"], marker, own, tuple(_earlier(config, stage, theirs)))


def _present_stage(config: RunConfig, text: str) -> str:
    for name in config.stages:
        if not export.exists(stages.export_url(config, name)):
            return name
    raise ValueError(f"--resume-from: {text}: all stages of {config.name} are done; give name=ANOTHER for a new run")


def _by_images(config: RunConfig, stage: str, images: int) -> str:
    folder = storage.join(stages.stage_url(config, stage), "checkpoints")
    found = list_committed(folder)
    for name in found:
        if images_of(name) == images:
            return storage.join(folder, name)
    have = ", ".join(f"{images_of(name):,}" for name in found) or "none"
    raise ValueError(
        f"--resume-from: stage {stage} of {config.name} has no checkpoint at {images:,} images; it has {have}"
    )


def _earlier(config: RunConfig, stage: str, theirs: str) -> Iterator[tuple[str, str]]:
    """Exports of the stages before: those that are missing here, from there and to here."""
    for name in config.stages:
        if name == stage:
            return
        here, there = stages.export_url(config, name), storage.join(theirs, name, "export")
        if export.exists(here):
            continue
        if not export.exists(there):
            raise ValueError(
                f"--resume-from: stage {name} comes before {stage}, and neither {config.name} nor "
                f"{storage.redact(theirs)} has its export"
            )
        yield there, here


def check(config: RunConfig, source: ResumePoint, system: System, vocabulary: list[str]) -> None:
    """Whether a checkpoint fits the stage, whose system and vocabulary are these. Raises ValueError, one sentence."""
    where, marker, stage = storage.redact(source.url), source.marker, config.stages[source.stage]
    try:
        made = marker["config"]["stages"][source.stage]
    except (KeyError, TypeError):
        raise ValueError(f"--resume-from: {where} does not say with which configuration it was made") from None
    wanted = {"system": stage.system, "group_size": stage.group_size, "groups": stage.groups}
    for key, here in wanted.items():
        if made[key] != here:
            raise ValueError(
                f"--resume-from: {where} was made with stages.{source.stage}.{key} {made[key]}, and here it is {here}"
            )
    if marker["vocabulary"] != vocabulary:
        raise ValueError(
            f"--resume-from: {where} knows {len(marker['vocabulary'])} words, and not the same ones as this data with "
            f"its {len(vocabulary)}"
        )
    for role_name, role in system.roles.items():
        for key, value in role.net.state_dict().items():
            saved = marker["tensors"].get(f"{role_name}/net/{key}")
            if saved is None or saved["shape"] != list(value.shape):
                there = "missing" if saved is None else f"{saved['shape']}"
                raise ValueError(
                    f"--resume-from: {where}: '{role_name}/net/{key}' is {there} there and {list(value.shape)} in this "
                    "configuration"
                )
    if stage.images <= source.images:
        raise ValueError(
            f"--resume-from: {where} has seen {source.images:,} images, and stages.{source.stage}.images is "
            f"{stage.images:,}"
        )


def prepare(config: RunConfig, text: str, source: ResumePoint) -> None:
    """Make the checkpoint the newest of its stage. Of the run's own, those that came after it are removed."""
    checkpoints = storage.join(stages.stage_url(config, source.stage), "checkpoints")
    storage.remove(storage.join(stages.run_url(config), stages.RUN_ID))  # so that no copy in memory is newer
    for there, here in source.exports:
        _copy(there, here, last=export.INDEX)
    folder = source.url.rpartition("/")[2]
    if source.own:
        newer = [name for name in list_folders(checkpoints) if name > folder]
        for name in newer:
            storage.remove(storage.join(checkpoints, name))
        logger.info(
            "stage %s goes back to %s images; %d newer checkpoints removed", source.stage, source.images, len(newer)
        )
    else:
        _copy(source.url, storage.join(checkpoints, folder), last=COMMIT)
    note = {"asked": text, "checkpoint": storage.redact(source.url), "images": source.images, "time": now()}
    storage.write_json(storage.join(stages.run_url(config), NOTE), note)


def _copy(there: str, here: str, last: str) -> None:
    """Copy the files of a folder, the one that makes it whole last."""
    names = [name for name in storage.list_dir(there) if name != last]
    for name in [*names, last]:
        storage.write_bytes(storage.join(here, name), storage.read_bytes(storage.join(there, name)))
