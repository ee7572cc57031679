"""Checkpoints of a stage: where they lie, which one is the newest good one, how many stay."""

from __future__ import annotations

import logging
import uuid
from dataclasses import dataclass
from typing import Any

from t2idist import storage
from t2idist.engine import dcp
from t2idist.engine.train import Trainer
from t2idist.engine.world import World

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A committed checkpoint."""

    url: str
    images: int
    marker: dict[str, Any]


class Checkpoints:
    """The checkpoints under `url` (a folder a save, named by images seen and by the attempt that wrote it).

    meta: plain values that go into every commit marker (config, vocabulary, versions).
    """

    def __init__(self, url: str, world: World, keep: int, meta: dict[str, Any]) -> None:
        self.url, self.world, self.keep, self.meta = url, world, keep, meta
        self.attempt = world.from_first(uuid.uuid4().hex[:8])

    def save(self, trainer: Trainer) -> str:
        """Write and commit the trainer's state with all workers; gives the folder's URL. A collective."""
        folder = storage.join(self.url, f"{trainer.images:012d}-{self.attempt}")
        state = trainer.state() | trainer.settled_buffers() | trainer.own_buffers()
        meta = {
            "images": trainer.images,
            "step": trainer.step,
            "workers": self.world.size,
            "groups": trainer.share.groups,
            "group_size": trainer.group_size,
            **self.meta,
        }
        dcp.save(state, folder, meta, self.world.group)
        if self.world.first:
            self._prune()
        return folder

    def restore(self, trainer: Trainer) -> Found | None:
        """Load the newest good checkpoint into the trainer; None where there is none at all. A collective.

        A torn or rotten one is passed over with a warning that names the file. Raises ValueError where checkpoints
        exist but none can be used, or where the newest was made with another group size or number of groups.
        """
        faults = []
        for folder in self.world.from_first(list_folders(self.url)):
            url = storage.join(self.url, folder)
            try:
                found = self._load(trainer, url)
            except dcp.Broken as error:
                faults.append(str(error))
                if self.world.first:
                    logger.warning("checkpoint passed over: %s", error)
                continue
            return found
        if faults:
            raise ValueError(f"{self.url}: no checkpoint can be used: {faults[0]}")
        return None

    def _load(self, trainer: Trainer, url: str) -> Found:
        marker = dcp.read_marker(url)
        _check_scale(url, marker, trainer)
        state = trainer.state()
        if marker["workers"] == self.world.size:
            own = {key.split("/", 2)[2]: key for key in trainer.own_buffers()}
            state = {own.get(key, key): value for key, value in state.items()}
        dcp.load(state, url, marker, self.world.group)
        trainer.step = marker["step"]
        return Found(url, marker["images"], marker)

    def _prune(self) -> None:
        committed: list[str] = []
        torn: list[str] = []
        for folder in list_folders(self.url):
            complete = storage.exists(storage.join(self.url, folder, dcp.COMMIT))
            (committed if complete else torn).append(folder)
        for folder in committed[self.keep :] + torn:
            storage.remove(storage.join(self.url, folder))


def list_folders(url: str) -> list[str]:
    """Names of checkpoint folders, newest first, complete or not."""
    return sorted((name for name in storage.list_dir(url) if name[:12].isdigit()), reverse=True)


def _check_scale(url: str, marker: dict[str, Any], trainer: Trainer) -> None:
    for name, now in (("groups", trainer.share.groups), ("group_size", trainer.group_size)):
        if marker[name] != now:
            raise ValueError(
                f"{url}: made with {name} {marker[name]}, and this run has {name} {now}; "
                "give the run another name, or the same scale"
            )
