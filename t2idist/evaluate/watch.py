"""What the first worker looks at during training: pictures that are drawn or translated, R-precision of matching."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from t2idist import storage
from t2idist.config import RunConfig
from t2idist.contract import System
from t2idist.data.shards import Dataset
from t2idist.data.stream import load_split
from t2idist.evaluate.monitor import Monitor, can_draw, can_match, can_translate, reads_vectors, score_matching
from t2idist.evaluate.translate import Translations

logger = logging.getLogger(__name__)

GRID_CAPTIONS = 8
VAL_PICTURES = 1000


class Watcher:
    """Looks at a stage's networks at a cadence. datasets, folder: the stage's."""

    def __init__(
        self,
        system: System,
        datasets: Sequence[Dataset],
        config: RunConfig,
        stage: str,
        folder: str,
        device: torch.device,
    ) -> None:
        self._system, self._device, self._seed = system, device, config.seed
        data, dataset = config.stage_data(stage), datasets[0]
        self._monitor, self._val = None, None
        self._translations = None
        if can_translate(system):
            self._translations = Translations(
                system, datasets, crop=data.crop, folder=storage.join(folder, "pictures"), device=device
            )
        if can_draw(system):
            test = load_split(
                dataset,
                shown_split(dataset),
                sizes=system.sizes,
                max_words=data.max_words,
                limit=GRID_CAPTIONS,
                crop=data.crop,
            )
            given = config.report.captions
            if given and reads_vectors(system, dataset.vector_dim):
                logger.warning(
                    "report.captions: stage %s reads the data's sentence vectors, and these captions have none; the "
                    "grids show captions of the data",
                    stage,
                )
                given = ()
            captions = given or tuple(captions[0] for captions in test.captions)
            self._monitor = Monitor(
                system,
                dataset.vocabulary,
                captions,
                max_words=data.max_words,
                draws=config.report.draws,
                seed=config.seed,
                folder=storage.join(folder, "pictures"),
                device=device,
                real=None if given else test.batch.images[-1],
                vectors=None if given else test.batch.captions.vectors,
            )
        if can_match(system) and "val" in dataset.splits:
            self._val = load_split(
                dataset, "val", sizes=system.sizes, max_words=data.max_words, limit=VAL_PICTURES, crop=data.crop
            )

    def look(self, nets: Mapping[str, nn.Module], images_seen: int) -> Mapping[str, float]:
        """Write the pictures, and give the measured values."""
        if self._monitor is not None:
            self._monitor.write(nets, images_seen)
        if self._translations is not None:
            self._translations.write(nets, images_seen)
        if self._val is None:
            return {}
        return score_matching(self._system, nets, self._val.batch, seed=self._seed, device=self._device)


def shown_split(dataset: Dataset) -> str:
    """The split whose captions the grids show: the first of test, val and train that has captions."""
    for name in ("test", "val"):
        if name in dataset.splits and dataset.split(name).captions(0):
            return name
    return "train"
