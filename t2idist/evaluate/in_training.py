"""What the first worker looks at during training: pictures that are drawn or translated, R-precision of matching."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from t2idist import storage
from t2idist.config import RunConfig
from t2idist.contract import System
from t2idist.data.loader import load_split
from t2idist.data.shards import Dataset
from t2idist.evaluate.background_scorer import BackgroundScorer
from t2idist.evaluate.diversity import WITHIN, Diversity
from t2idist.evaluate.monitor import (
    ROWS,
    SampleGrid,
    can_draw,
    can_match,
    can_translate,
    reads_text,
    reads_vectors,
    score_matching,
)
from t2idist.sampling.translate import Translations

logger = logging.getLogger(__name__)

VAL_PICTURES = 1000


class InTrainingEvaluator:
    """Looks at a stage's networks at a cadence. datasets, folder: the stage's. index: that of its export at so many
    images."""

    def __init__(
        self,
        system: System,
        datasets: Sequence[Dataset],
        config: RunConfig,
        stage: str,
        folder: str,
        device: torch.device,
        index: Callable[[int], dict[str, Any]],
    ) -> None:
        self._system, self._device, self._seed = system, device, config.seed
        data, dataset = config.stage_data(stage), datasets[0]
        self._monitor, self._val, self._diversity = None, None, None
        self._draws = config.report.draws
        self._translations = None
        if can_translate(system):
            self._translations = Translations(
                system, datasets, crop=data.crop, folder=storage.join(folder, "pictures"), device=device
            )
        if can_draw(system):
            self._monitor = _monitor(system, dataset, config, stage, folder, device)
            with contextlib.suppress(ValueError):  # what it takes is an extra
                self._diversity = Diversity(device)
        if can_match(system) and "val" in dataset.splits:
            self._val = load_split(
                dataset, "val", sizes=system.sizes, max_words=data.max_words, limit=VAL_PICTURES, crop=data.crop
            )

        self._scorer = None
        self._last_images = config.stages[stage].steps * config.stages[stage].images_per_step
        if config.stages[stage].scores_every_images:
            if not can_draw(system):
                raise ValueError(
                    f"stages.{stage}.scores_every_images: {config.stages[stage].system} draws no pictures from captions"
                )
            self._scorer = BackgroundScorer(config.scores, folder, index)

    def close(self, finished: bool) -> None:
        """End what goes on beside. finished: whether the stage is done."""
        if self._scorer is not None:
            self._scorer.close(finished)

    def look(
        self, nets: Mapping[str, nn.Module], images_seen: int, *, pictures: bool, scores: bool
    ) -> Mapping[str, float]:
        """Write the pictures and give the measured values; have the networks scored."""
        if scores and self._scorer is not None:
            self._scorer.offer(nets, images_seen, last=images_seen >= self._last_images)
        if not pictures:
            return {}
        values: dict[str, float] = {}
        if self._monitor is not None:
            sample = self._monitor.draw(nets)
            self._monitor.write(sample, images_seen)
            if self._diversity is not None:
                columns = self._draws if self._monitor.captions else len(sample.images[-1])
                values |= self._diversity(sample.images[-1], columns)
                if self._diversity.collapsed(values):
                    logger.warning(
                        "collapse: after %s images draws of one caption hardly differ (%s %.2g)",
                        images_seen,
                        WITHIN,
                        values[WITHIN],
                    )
        if self._translations is not None:
            self._translations.write(nets, images_seen)
        if self._val is not None:
            values |= score_matching(self._system, nets, self._val.batch, seed=self._seed, device=self._device)
        return values


def _monitor(
    system: System, dataset: Dataset, config: RunConfig, stage: str, folder: str, device: torch.device
) -> SampleGrid:
    """Of the run's captions, or of the data's, beside their pictures."""
    data, given = config.stage_data(stage), config.report.captions
    if given and reads_vectors(system, dataset.vector_dim):
        logger.warning(
            "report.captions: stage %s reads the data's sentence vectors, and these captions have none; the grids show "
            "captions of the data",
            stage,
        )
        given = ()
    captions: tuple[str, ...] = given if reads_text(system, dataset.vector_dim) else ()
    real, vectors = None, None
    if reads_text(system, dataset.vector_dim) and not given:
        sizes, split = system.sizes, shown_split(dataset)
        shown = load_split(dataset, split, sizes=sizes, max_words=data.max_words, limit=ROWS, crop=data.crop)
        captions = tuple(of_picture[0] for of_picture in shown.captions)
        real, vectors = shown.batch.images[-1], shown.batch.captions.vectors
    return SampleGrid(
        system,
        dataset.vocabulary,
        captions,
        max_words=data.max_words,
        draws=config.report.draws,
        seed=config.seed,
        folder=storage.join(folder, "pictures"),
        device=device,
        real=real,
        vectors=vectors,
    )


def shown_split(dataset: Dataset) -> str:
    """The split whose captions the grids show: the first of test, val and train that has captions."""
    for name in ("test", "val"):
        if name in dataset.splits and dataset.split(name).captions(0):
            return name
    return "train"
