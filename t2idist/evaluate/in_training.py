"""Evaluation during training, on the first worker: grids of sample images, R-precision, scores in the background."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from t2idist import storage
from t2idist.config import RunConfig
from t2idist.contract import (
    Sample,
    SupportsDomains,
    SupportsEmbed,
    SupportsSample,
    SupportsTranslate,
    System,
    is_text_conditional,
    uses_sentence_vectors,
)
from t2idist.data.loader import load_split
from t2idist.data.mixing import training_sets
from t2idist.data.shards import Dataset
from t2idist.data.tokenizer import Vocabulary, known_words
from t2idist.evaluate import background_scorer, best_weights
from t2idist.evaluate.background_scorer import BackgroundScorer, OnScores
from t2idist.evaluate.diversity import WITHIN, Diversity
from t2idist.evaluate.r_precision import metric_name, validation_score
from t2idist.nn.images import to_float
from t2idist.sampling.figures import attention_figure, grid, png_bytes, stack_figures
from t2idist.sampling.generate import GaussianNoise, empty_captions, encode_captions, eval_mode, generate
from t2idist.sampling.translate import DomainGrid, TranslationGrid

logger = logging.getLogger(__name__)

VAL_IMAGES = 1000
GRID_ROWS = 8
ATTENTION_CAPTIONS = 2


class SampleGrid:
    """Generates images of the same captions with the same noise at every cadence.

    Args:
        system: system that generates images (SupportsSample).
        vocabulary: vocabulary of the run.
        captions: one per row of the grid; none for an unconditional system, whose rows have different noise.
        max_words: maximum length of an encoded caption.
        columns: images per caption; a column has the same noise in every row of captions.
        seed: seed of the noise.
        folder: URL under which figures are written.
        device: device of the networks.
        real: (R, 3, S, S) in [-1, 1] or uint8, a real image of each caption, shown next to it.
        vectors: (R, D) sentence vectors of the captions, if the data has them.
    """

    def __init__(
        self,
        system: System,
        vocabulary: Vocabulary,
        captions: Sequence[str],
        *,
        max_words: int,
        columns: int,
        seed: int,
        folder: str,
        device: torch.device,
        real: Tensor | None = None,
        vectors: Tensor | None = None,
    ) -> None:
        assert isinstance(system, SupportsSample)
        self._system: SupportsSample = system
        self.captions = tuple(captions)
        self._columns = columns
        self._seed = seed
        self._folder = folder
        self._device = device
        self._real = None if real is None else to_float(real)
        encoded = encode_captions(vocabulary, self.captions, max_words) if captions else empty_captions(GRID_ROWS)
        self._encoded = (encoded if vectors is None else replace(encoded, vectors=vectors)).repeat_each(columns)
        self._positions = [i % columns if captions else i for i in range(len(self._encoded))]
        self._words = [known_words(vocabulary, caption)[:max_words] for caption in self.captions]

    def generate(self, nets: Mapping[str, nn.Module]) -> Sample:
        """Generate with the exported networks. Restores their mode and uses no global random state."""
        with eval_mode(nets):
            noise = GaussianNoise(self._seed, self._positions, self._device)
            return generate(self._system, nets, self._encoded, noise, device=self._device)

    def write(self, sample: Sample, images_seen: int) -> list[str]:
        """Write the grid and, if there is attention, its figure; returns the URLs."""
        written = [storage.join(self._folder, f"images_{images_seen:09d}.png")]
        sheet = grid(sample.images, self.captions or [""] * GRID_ROWS, self._columns, self._real)
        storage.write_bytes(written[0], png_bytes(sheet))
        if sample.attention:
            written.append(storage.join(self._folder, f"attention_{images_seen:09d}.png"))
            figures = []
            for caption in range(min(ATTENTION_CAPTIONS, len(self.captions))):
                row = caption * self._columns
                maps = [stage[row] for stage in sample.attention]
                figures.append(attention_figure(sample.images[-1][row], self._words[caption], maps))
            storage.write_bytes(written[1], png_bytes(stack_figures(figures)))
        return written


class InTrainingEvaluator:
    """Evaluates the networks of a stage at its cadences.

    Args:
        system: the stage's system.
        datasets: the stage's data sets.
        config: configuration of the run.
        stage: name of the stage.
        folder: URL of the stage.
        device: device of the networks.
        index: returns the index of an export of the stage at a number of images.
        on_pictures: called with the images seen and the URLs of the sample images that were written.
        on_scores: called with the images that scored weights have seen, and the scores by name; from another thread.
    """

    def __init__(
        self,
        system: System,
        datasets: Sequence[Dataset],
        config: RunConfig,
        stage: str,
        folder: str,
        device: torch.device,
        index: Callable[[int], dict[str, Any]],
        on_pictures: Callable[[int, Sequence[str]], None] = lambda images_seen, urls: None,
        on_scores: OnScores = lambda images_seen, scores: None,
    ) -> None:
        self._on_pictures = on_pictures
        self._system, self._device, self._seed = system, device, config.seed
        data, dataset, settings = config.stage_data(stage), datasets[0], config.stages[stage]
        self._grid, self._val = None, None
        self._columns = config.report.draws
        self._translations: TranslationGrid | DomainGrid | None = None
        place: dict[str, Any] = {"crop": data.crop, "folder": storage.join(folder, "pictures"), "device": device}
        if isinstance(system, SupportsTranslate):
            self._translations = TranslationGrid(system, datasets, **place)
        elif isinstance(system, SupportsDomains):
            self._translations = DomainGrid(system, training_sets(system, datasets), **place)
        if isinstance(system, SupportsSample):
            self._grid = _sample_grid(system, dataset, config, stage, folder, device)
        if isinstance(system, SupportsEmbed) and "val" in dataset.splits:
            self._val = load_split(
                dataset, "val", sizes=system.sizes, max_words=data.max_words, limit=VAL_IMAGES, crop=data.crop
            )

        self._scorer = None
        self._settings, self._best = settings, None
        if best_weights.is_tracked(system, settings):
            self._best = best_weights.BestWeights(folder, index)
        self._last_images = settings.steps * settings.images_per_step
        if settings.scores_every_images:
            check_scores(system, config, stage)
            self._scorer = BackgroundScorer(config.scores, folder, index, on_scores)

    @functools.cached_property
    def _diversity(self) -> Diversity | None:
        """Loaded with the first images, so that a restart does not wait for it."""
        with contextlib.suppress(ValueError):  # its network is an optional dependency
            return Diversity(self._device)
        return None

    def close(self, finished: bool) -> None:
        """End the background process. `finished`: the stage is done, so its last weights may still be scored."""
        if self._scorer is not None:
            self._scorer.close(finished)

    def evaluate(
        self, nets: Mapping[str, nn.Module], images_seen: int, *, images: bool, scores: bool
    ) -> Mapping[str, float]:
        """Evaluate the exported networks.

        Args:
            nets: exported networks, with EMA weights.
            images_seen: images seen by the stage.
            images: write sample images and measure them.
            scores: submit the networks to the background scorer.

        Returns:
            Metrics by name.
        """
        if scores and self._scorer is not None:
            self._scorer.submit(nets, images_seen, last=images_seen >= self._last_images)
        if not images:
            return {}
        values: dict[str, float] = {}
        if self._grid is not None:
            sample = self._grid.generate(nets)
            self._on_pictures(images_seen, self._grid.write(sample, images_seen))
            if self._diversity is not None:
                columns = self._columns if self._grid.captions else len(sample.images[-1])
                values |= self._diversity(sample.images[-1], columns)
                if self._diversity.collapsed(values):
                    logger.warning(
                        "collapse: after %s images, images of one caption hardly differ (%s %.2g)",
                        images_seen,
                        WITHIN,
                        values[WITHIN],
                    )
        if self._translations is not None:
            self._on_pictures(images_seen, [self._translations.write(nets, images_seen)])
        return values | self._score_held_out(nets, images_seen)

    def score_last(self, nets: Mapping[str, nn.Module], images_seen: int) -> None:
        """Score the last weights of the stage for the choice of the best ones, if that was not done.

        It was not if the stage was stopped here when its budget was larger.
        """
        if self._best is not None and not self._best.is_recorded(images_seen):
            self._score_held_out(nets, images_seen)

    def _score_held_out(self, nets: Mapping[str, nn.Module], images_seen: int) -> dict[str, float]:
        """Return the R-precision of the val split under its name, and record it; empty if there is none."""
        if self._val is None or not isinstance(self._system, SupportsEmbed):
            return {}
        score = validation_score(self._system, nets, self._val.batch, seed=self._seed, device=self._device)
        if score is None:
            return {}
        if self._best is not None and self._is_regular(images_seen):
            self._best.record(nets, images_seen, score)
        return {metric_name(score): score.mean}

    def _is_regular(self, images: int) -> bool:
        """Return whether every run of the stage evaluates here, however often it is stopped."""
        every, step = self._settings.pictures_every_images, self._settings.images_per_step
        return images >= self._last_images or images // every > (images - step) // every


def check_scores(system: System, config: RunConfig, stage: str, with_judge: bool = True) -> None:
    """Check that the scores for which a stage asks, if it does, can be computed. Raises ValueError.

    Args:
        with_judge: as in `background_scorer.check`.
    """
    settings = config.stages[stage]
    if not settings.scores_every_images:
        return
    if not isinstance(system, SupportsSample):
        raise ValueError(
            f"stages.{stage}.scores_every_images: {settings.system} does not generate images from captions; give 0"
        )
    background_scorer.check(config.scores, with_judge)


def _sample_grid(
    system: System, dataset: Dataset, config: RunConfig, stage: str, folder: str, device: torch.device
) -> SampleGrid:
    """Build the grid of the run's captions or, if it gives none, of captions of the data with their real images."""
    data, captions = config.stage_data(stage), config.report.captions
    if captions and uses_sentence_vectors(system, dataset.vector_dim):
        logger.warning(
            "report.captions: stage %s reads the data's sentence vectors, which these captions do not have; the grids "
            "show captions of the data",
            stage,
        )
        captions = ()
    real, vectors = None, None
    if not is_text_conditional(system, dataset.vector_dim):
        captions = ()
    elif not captions:
        split = caption_split(dataset)
        shown = load_split(
            dataset, split, sizes=system.sizes, max_words=data.max_words, limit=GRID_ROWS, crop=data.crop
        )
        captions = tuple(of_image[0] for of_image in shown.captions)
        real, vectors = shown.batch.images[-1], shown.batch.captions.vectors
    return SampleGrid(
        system,
        dataset.vocabulary,
        captions,
        max_words=data.max_words,
        columns=config.report.draws,
        seed=config.seed,
        folder=storage.join(folder, "pictures"),
        device=device,
        real=real,
        vectors=vectors,
    )


def caption_split(dataset: Dataset) -> str:
    """Return the split whose captions the grids show: the first of test, val and train that has captions."""
    for name in ("test", "val"):
        if name in dataset.splits and dataset.split(name).captions(0):
            return name
    return "train"
