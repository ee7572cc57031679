"""The weights of a stage with the best held-out R-precision, which are exported if it falls until the end.

The first worker writes them when it evaluates, next to the checkpoints; ``best/best.json`` lists every evaluation. Both
are functions of the networks alone: a stage that was stopped and resumed, on any number of workers, has the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from t2idist import storage
from t2idist.config import EXPORT_BY_SYSTEM, EXPORT_R_PRECISION, StageConfig
from t2idist.contract import SupportsEmbed, System
from t2idist.data.shards import Dataset
from t2idist.engine.checkpoint import export
from t2idist.evaluate.r_precision import RPrecision

logger = logging.getLogger(__name__)

FOLDER, FILE = "best", "best.json"
STANDARD_ERRORS = 2.0
"""A fall by less is noise."""


@dataclass(frozen=True)
class HeldOut:
    """R-precision of the val split at a number of images."""

    images: int
    value: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.value:.3f} +- {self.standard_error:.3f} after {self.images:,} images"


def is_tracked(system: System, settings: StageConfig) -> bool:
    """Return whether a stage exports its best weights: as its config says, or as the system declares."""
    chosen: str = settings.export_best
    if chosen == EXPORT_BY_SYSTEM:
        chosen = getattr(system, "export_best", "")
    return chosen == EXPORT_R_PRECISION and isinstance(system, SupportsEmbed)


def missing_data(dataset: Dataset) -> str:
    """Return what held-out R-precision lacks in the data; "" if nothing."""
    if "val" not in dataset.splits:
        return f"the data has no split val, only {', '.join(dataset.splits)}"
    return "" if len(set(dataset.split("val").class_ids)) > 1 else "all images of split val have the same class"


class BestWeights:
    """Keeps the best weights of a stage.

    Args:
        folder: URL of the stage.
        index: returns the index of an export of the stage at a number of images.
    """

    def __init__(self, folder: str, index: Callable[[int], dict[str, Any]]) -> None:
        self._folder, self._index = folder, index

    def record(self, nets: Mapping[str, nn.Module], images: int, score: RPrecision) -> None:
        """Record a score, in the place of an earlier one of as many images; write the networks if they are the best."""
        new = HeldOut(images, score.mean, score.standard_error)
        best, scores = read(self._folder)
        if best is None or best.images == images or new.value > best.value:
            export.write(_weights_url(self._folder, images), nets, self._index(images))
            best = new
        _write(self._folder, best, [*(each for each in scores if each.images != images), new])

    def is_recorded(self, images: int) -> bool:
        """Return whether the weights after `images` images have a score."""
        return any(each.images == images for each in read(self._folder)[1])


def read(folder: str) -> tuple[HeldOut | None, list[HeldOut]]:
    """Read the score of a stage whose weights are kept, and all of its scores in order of images."""
    url = storage.join(folder, FOLDER, FILE)
    record = storage.read_json_if_present(url)
    if record is None:
        return None, []
    scores = [HeldOut(**each) for each in record["scores"]]
    return next((each for each in scores if each.images == record["best"]), None), scores


def forget_after(folder: str, images: int) -> None:
    """Remove what a stage has recorded after `images` images, from where it trains again, perhaps differently."""
    best, scores = read(folder)
    remaining = [each for each in scores if each.images <= images]
    if len(remaining) < len(scores):
        _write(folder, best if best in remaining else None, remaining)


def better_than_last(folder: str, last_images: int) -> tuple[HeldOut, HeldOut] | None:
    """Return the best and the last score if the last is worse by more than noise, else None.

    Args:
        last_images: images of the stage, at which the last weights were scored.
    """
    best, scores = read(folder)
    last = next((each for each in scores if each.images == last_images), None)
    if best is None or last is None:
        return None
    noise = STANDARD_ERRORS * (best.standard_error**2 + last.standard_error**2) ** 0.5
    return (best, last) if last.value < best.value - noise else None


def export_if_better(stage: str, folder: str, target: str, last_images: int) -> bool:
    """Write the export of a stage from its best weights if the last ones are worse by more than noise.

    Args:
        stage: its name, for the log.
        last_images: as in `better_than_last`.

    Returns:
        Whether the export was written; not if the best weights are damaged.
    """
    found = better_than_last(folder, last_images)
    if found is None:
        return False
    best, last = found
    try:
        export_best(folder, target, best, last)
    except ValueError as error:
        logger.warning("stage %s: its best weights cannot be read, the last ones are exported: %s", stage, error)
        return False
    logger.warning(
        "stage %s: held-out R-precision fell from %s to %s; the weights after %s images are exported "
        "(stages.%s.export_best=last would export the last)", stage, best, last, f"{best.images:,}", stage
    )  # fmt: skip
    return True


def export_best(folder: str, target: str, best: HeldOut, last: HeldOut) -> None:
    """Write the export of a stage from its best weights; ``export.json`` records why. Raises ValueError if damaged."""
    facts = {"selected": {"by": "held-out R-precision", "best": asdict(best), "last": asdict(last)}}
    export.copy(_weights_url(folder, best.images), target, facts)


def remove(folder: str, kept: HeldOut | None = None) -> None:
    """Remove the weights of a stage, except the weights of `kept`. Its scores stay."""
    for name in storage.list_dir(storage.join(folder, FOLDER)):
        if name.isdigit() and (kept is None or int(name) != kept.images):
            storage.remove(storage.join(folder, FOLDER, name))


def _write(folder: str, best: HeldOut | None, scores: Sequence[HeldOut]) -> None:
    """Write the scores, then remove all weights but the best."""
    in_order = sorted(scores, key=lambda each: each.images)
    record = {"best": None if best is None else best.images, "scores": [asdict(each) for each in in_order]}
    storage.write_json(storage.join(folder, FOLDER, FILE), record)
    remove(folder, best)


def _weights_url(folder: str, images: int) -> str:
    return storage.join(folder, FOLDER, f"{images:012d}")
