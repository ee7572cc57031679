"""Metrics of a score job, computed from its chunks, and which captions and attributes are followed best."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from t2idist.data.shards import Dataset
from t2idist.evaluate import score_chunks
from t2idist.evaluate.distribution_metrics import (
    bootstrap_error,
    fid,
    inception_score,
    kid,
    nearest_neighbours,
    precision_recall,
)
from t2idist.evaluate.r_precision import CANDIDATES, CaptionSpace, RPrecision, max_candidates, r_precision
from t2idist.evaluate.score_chunks import GENERATED, REAL, TRAIN, CaptionEncoder, GatheredFeatures, ScoreJob

EXTRACTOR_OF_METRIC = {"clip_r": "clip", "damsm_r": "damsm"}
"""Variants of R-precision whose extractor embeds captions itself."""
NEEDS_TRAIN = ("r_precision", "memorisation")
KID_SUBSET = 1000
NEIGHBOURS = 5
MIN_BREAKDOWN_COUNT = 20
"""Fewest images of a word or attribute for a row of its own in the breakdown."""
NORMAL_95 = 1.96


@dataclass(frozen=True)
class Score:
    """The result of one metric."""

    name: str
    value: float
    error: float | None
    """As the note says."""
    low: float | None
    """Ends of the 95 % interval, if the error is a standard error."""
    high: float | None
    real: float | None
    """Value of real images, if known."""
    chance: float | None
    """Value of a random choice, if known."""
    n: int
    note: str
    bias: float | None = None
    """Value of as many real images against other real ones: what perfect images would get (None: not computed)."""


@dataclass(frozen=True)
class MetricOptions:
    background: bool = False
    """Ignore class 0 of the classifier."""
    splits: int = 10
    """Splits of the Inception score."""
    kid_subset: int = 0
    """0: 1000, or half of the images if there are fewer."""
    bootstrap: int = 20
    """Draws for standard errors, or 0."""


@dataclass(frozen=True)
class RPrecisionResult:
    name: str
    generated: RPrecision
    real: RPrecision
    captions: tuple[str, ...]
    """Of the generated images."""
    samples: tuple[int, ...]
    """Indices in the split of the generated images."""


def check_sample_counts(job: ScoreJob, options: MetricOptions, metrics: Sequence[str], dataset: Dataset) -> None:
    """Raise ValueError if there are too few images for a metric; called before any image is generated."""
    counts, fewest = f"there are {job.real} real and {job.n} generated images", min(job.real, job.n)
    if "kid" in metrics and fewest < options.kid_subset:
        raise ValueError(f"--subset {options.kid_subset}: {counts}; give more, or a smaller subset")
    if "prdc" in metrics and fewest < 4 * NEIGHBOURS:
        raise ValueError(f"--metrics prdc: {counts}; {NEIGHBOURS} neighbours need at least {4 * NEIGHBOURS}")
    if "is" in metrics and fewest < options.splits:
        raise ValueError(f"--splits {options.splits}: {counts}; give more, or fewer splits")
    if fewest < 4:
        raise ValueError(f"--n {job.n}: {counts}; at least 4 are needed")
    by_caption = [name for name in metrics if name == "r_precision" or name in EXTRACTOR_OF_METRIC]
    for kind in (GENERATED, REAL) if by_caption else ():
        rows = score_chunks.sample_rows(kind, job, len(dataset.split(job.split)))
        available = max_candidates(score_chunks.class_ids_of(dataset, job.split, rows.samples))
        if available < CANDIDATES:
            raise ValueError(
                f"--metrics {by_caption[0]}: every image needs {CANDIDATES} candidate captions, its own and others of "
                f"other classes; one of the {kind} images has only {available}; leave it out of --metrics, or "
                "give a larger --n or --split"
            )


class MetricCalculator:
    """Computes metrics of a job whose chunks are all done."""

    def __init__(self, job: ScoreJob, options: MetricOptions, dataset: Dataset, folder: str) -> None:
        self._job, self._options, self._dataset = job, options, dataset
        self.generated = score_chunks.gather_features(job, GENERATED, folder)
        self.real = score_chunks.gather_features(job, REAL, folder)
        self.train = score_chunks.gather_features(job, TRAIN, folder) if job.train else None
        self.r_precisions: list[RPrecisionResult] = []
        """Filled by `rows`."""

    def rows(self, metrics: Sequence[str]) -> list[Score]:
        """Compute metrics, in order. Raises ValueError if one is not available."""
        methods: dict[str, Callable[[], list[Score]]] = {
            "fid": self._fid,
            "kid": self._kid,
            "is": self._inception_score,
            "prdc": self._precision_recall,
            "r_precision": self._r_precision_by_features,
            "memorisation": self._memorisation,
            **{name: functools.partial(self._r_precision_by_extractor, name) for name in EXTRACTOR_OF_METRIC},
        }
        return [row for name in metrics for row in methods[name]()]

    def _fid(self) -> list[Score]:
        real, generated = self.real.outputs[0].features, self.generated.outputs[0].features
        n, seed, times = len(generated), self._job.seed, self._options.bootstrap
        value, halves = fid(real, generated), _halves(real, seed)
        error, note = None, f"{len(real)} real images; real: one half of them against the other"
        if times > 1:
            error = bootstrap_error(lambda rows: fid(real, generated[rows]), n, seed=seed, times=times)
            note += f"; error: standard error, {times} bootstrap draws"
        of_halves = fid(*halves)
        bias, bias_note = self._fid_bias(of_halves)
        return [replace(_score("fid", value, error, n, note + bias_note, real=of_halves), bias=bias)]

    def _fid_bias(self, of_halves: float) -> tuple[float, str]:
        """Return the FID of as many real images as were generated, against other real ones, and a note about it."""
        real, n = self.real.outputs[0].features, len(self.generated.rows)
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(self._job.seed))
        count = min(n, len(real) // 2)
        note = f"; bias: {count} real images against {len(real) - count} others"
        if count < n:
            note += f" (there are too few for {n}: that of {n} is smaller)"
        if n < real.shape[1]:
            note += f"; {n} images are few for {real.shape[1]} features: compare it only at the same numbers of images"
        if count == len(real) // 2:
            return of_halves, note
        return fid(real[order[count:]], real[order[:count]]), note

    def _kid(self) -> list[Score]:
        real, generated = self.real.outputs[0].features, self.generated.outputs[0].features
        subset = self.kid_subset
        result = kid(real, generated, seed=self._job.seed, subset_size=subset)
        halves = _halves(real, self._job.seed)
        of_real = kid(*halves, seed=self._job.seed, subset_size=min(subset, len(halves[0]))).mean
        note = f"100 subsets of {subset}; error: their deviation; real: one half of the real ones against the other"
        return [Score("kid", result.mean, result.std, None, None, of_real, None, len(generated), note)]

    @property
    def kid_subset(self) -> int:
        """Images in a subset of KID."""
        available = min(len(self.real.rows), len(self.generated.rows))
        return self._options.kid_subset or min(KID_SUBSET, available // 2)

    def _inception_score(self) -> list[Score]:
        if not self.generated.outputs[0].logits.shape[1]:
            raise ValueError(f"--metrics is: extractor {self._job.extractors[0].name} has no classifier")
        scores = []
        for features in (self.generated, self.real):
            logits = features.outputs[0].logits[:, 1:] if self._options.background else features.outputs[0].logits
            order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(self._job.seed))
            scores.append(inception_score(logits, splits=self._options.splits, order=order))
        generated, real = scores
        note = f"{self._options.splits} splits; error: their deviation"
        n = len(self.generated.rows)
        return [Score("is", generated.mean, generated.std, None, None, real.mean, None, n, note)]

    def _precision_recall(self) -> list[Score]:
        generated, real = self.generated.outputs[0].features, self.real.outputs[0].features
        values = asdict(precision_recall(real, generated, k=NEIGHBOURS))
        halves = asdict(precision_recall(*_halves(real, self._job.seed), k=NEIGHBOURS))
        note = f"{NEIGHBOURS} neighbours; real: one half of the real ones against the other"
        return [_score(name, value, None, len(generated), note, real=halves[name]) for name, value in values.items()]

    def _memorisation(self) -> list[Score]:
        """Divide the distance of generated images to the nearest training image by that of real test images."""
        train = cast(GatheredFeatures, self.train).outputs[0].features
        generated, real = (
            nearest_neighbours(features.outputs[0].features, train).distance for features in (self.generated, self.real)
        )
        note = (
            f"median distance to the nearest of {len(train)} training images, over that of real test images; "
            "near 0: copies"
        )
        value = float(generated.median()) / float(real.median())
        return [_score("nearest_train", value, None, len(generated), note, real=1.0)]

    # -------------------------------------------------------- R-precision
    def _r_precision_by_features(self) -> list[Score]:
        """R-precision in a space that is fitted to real training images."""
        train, split = cast(GatheredFeatures, self.train), self._dataset.split("train")
        samples = score_chunks.sample_rows(TRAIN, self._job, len(split)).samples
        captions = [split.captions(samples[row]) for row in train.rows.tolist()]
        space = CaptionSpace(train.outputs[0].features, captions, seed=self._job.seed)
        note = f"ridge regression from features to captions, fitted on {len(captions)} training images"

        def embed_images(features: GatheredFeatures) -> Tensor:
            return space.embed_images(features.outputs[0].features)

        return [self._r_precision("r_precision", space.embed_captions, embed_images, note)]

    def _r_precision_by_extractor(self, name: str) -> list[Score]:
        """R-precision by an extractor that embeds captions itself."""
        names = [spec.name for spec in self._job.extractors]
        index = names.index(EXTRACTOR_OF_METRIC[name])
        encoder = cast(CaptionEncoder, score_chunks.extractor_of(self._job, index))
        note = "by CLIP" if name == "clip_r" else "by a DAMSM: the published protocol"
        return [
            self._r_precision(name, encoder.embed_captions, lambda features: features.outputs[index].features, note)
        ]

    def _r_precision(
        self,
        name: str,
        embed_captions: Callable[[Sequence[str]], Tensor],
        embed_images: Callable[[GatheredFeatures], Tensor],
        note: str,
    ) -> Score:
        results = []
        dataset, split = self._dataset, self._job.split
        for kind, features in ((GENERATED, self.generated), (REAL, self.real)):
            chosen = score_chunks.sample_rows(kind, self._job, len(dataset.split(split)))
            rows = features.rows.tolist()
            samples = [chosen.samples[row] for row in rows]
            captions = [
                score_chunks.caption_of(dataset, split, chosen.samples[row], chosen.passes[row]) for row in rows
            ]
            class_ids = score_chunks.class_ids_of(dataset, split, samples)
            result = r_precision(
                embed_images(features),
                embed_captions(captions),
                seed=self._job.seed,
                class_ids=class_ids,
                candidates=CANDIDATES,
            )
            results.append((result, captions, samples))
        (generated, captions, samples), (real, _, _) = results
        self.r_precisions.append(RPrecisionResult(name, generated, real, tuple(captions), tuple(samples)))
        note = f"own caption out of {generated.candidates}, {note}; error: standard error"
        error, n = generated.standard_error, generated.n
        return _score(name, generated.mean, error, n, note, real=real.mean, chance=generated.chance)

    # -------------------------------------------------------- which captions are followed
    def breakdown(self) -> dict[str, list[dict[str, Any]]]:
        """Compute every R-precision by word of the caption and by attribute of the sample.

        Returns:
            Under "words" and "attributes", rows with "name", "n" and the value of each metric, lowest first. Rows of
            fewer than `MIN_BREAKDOWN_COUNT` images or of all images are left out.
        """
        if not self.r_precisions:
            return {}
        split, first = self._dataset.split(self._job.split), self.r_precisions[0]
        rows_by_kind: dict[str, dict[str, list[int]]] = {"words": defaultdict(list), "attributes": defaultdict(list)}
        for row, (caption, sample) in enumerate(zip(first.captions, first.samples, strict=True)):
            for word in set(self._dataset.vocabulary.tokenize(caption)):
                rows_by_kind["words"][word].append(row)
            for attribute in split.attributes(sample):
                rows_by_kind["attributes"][attribute].append(row)
        breakdown: dict[str, list[dict[str, Any]]] = {}
        for kind, rows_by_name in rows_by_kind.items():
            entries: list[dict[str, Any]] = [
                {
                    "name": name,
                    "n": len(rows),
                    **{result.name: float(result.generated.hits[rows].mean()) for result in self.r_precisions},
                }
                for name, rows in rows_by_name.items()
                if MIN_BREAKDOWN_COUNT <= len(rows) < first.generated.n
            ]
            names = [result.name for result in self.r_precisions]
            breakdown[kind] = sorted(entries, key=lambda entry: (sum(entry[x] for x in names), entry["name"]))
        return breakdown


def _score(
    name: str,
    value: float,
    error: float | None,
    n: int,
    note: str,
    *,
    real: float | None = None,
    chance: float | None = None,
) -> Score:
    """Build a score whose error is a standard error."""
    margin = None if error is None else NORMAL_95 * error
    low, high = (None, None) if margin is None else (value - margin, value + margin)
    return Score(name, value, error, low, high, real, chance, n, note)


def _halves(features: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    half = len(features) // 2
    return features[order[:half]], features[order[half : 2 * half]]
