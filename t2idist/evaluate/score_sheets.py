"""Sheets of images for a score job: captions that are followed best and worst, and nearest training images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from t2idist import storage
from t2idist.data.shards import Dataset
from t2idist.evaluate import score_chunks
from t2idist.evaluate.distribution_metrics import nearest_neighbours
from t2idist.evaluate.metrics import MetricCalculator, RPrecisionResult
from t2idist.evaluate.score_chunks import GENERATED, REAL, TRAIN, ScoreJob
from t2idist.nn.images import to_float
from t2idist.sampling.figures import grid, png_bytes

ROWS = 8


def write(job: ScoreJob, metrics: MetricCalculator, dataset: Dataset, folder: str) -> dict[str, str]:
    """Write the sheets that the computed metrics allow; returns their file names by content."""
    sheets: dict[str, bytes] = {}
    if metrics.r_precisions:
        result = metrics.r_precisions[0]
        order = torch.argsort(result.generated.margins, stable=True).tolist()
        for name, rows in (("worst", order[:ROWS]), ("best", order[::-1][:ROWS])):
            sheets[name] = _captions_sheet(job, metrics, dataset, result, rows)
    if metrics.train is not None:
        sheets["nearest"] = _nearest_sheet(job, metrics)
    for name, data in sheets.items():
        storage.write_bytes(storage.join(folder, f"{name}.png"), data)
    return {name: f"{name}.png" for name in sheets}


def _captions_sheet(
    job: ScoreJob, metrics: MetricCalculator, dataset: Dataset, result: RPrecisionResult, rows: Sequence[int]
) -> bytes:
    """Draw generated images of captions, next to their real images if all of them were scored."""
    generated, _ = score_chunks.load_images(job, GENERATED, metrics.generated.rows[list(rows)].tolist())
    real_samples = score_chunks.sample_rows(REAL, job, len(dataset.split(job.split))).samples
    row_of_sample = {real_samples[row]: row for row in metrics.real.rows.tolist()}
    samples = [result.samples[row] for row in rows]
    real = None
    if all(sample in row_of_sample for sample in samples):
        real = _load_in_order(job, REAL, [row_of_sample[sample] for sample in samples])
    return png_bytes(grid([to_float(generated)], [result.captions[row] for row in rows], 1, real))


def _nearest_sheet(job: ScoreJob, metrics: MetricCalculator) -> bytes:
    """Draw the generated images that are nearest to a training image, next to it."""
    assert metrics.train is not None
    neighbours = nearest_neighbours(metrics.generated.outputs[0].features, metrics.train.outputs[0].features)
    rows = torch.argsort(neighbours.distance, stable=True)[:ROWS]
    generated, _ = score_chunks.load_images(job, GENERATED, metrics.generated.rows[rows].tolist())
    real = _load_in_order(job, TRAIN, metrics.train.rows[neighbours.row[rows]].tolist())
    labels = [f"distance {float(neighbours.distance[row]):.3g}; real: the nearest of training" for row in rows]
    return png_bytes(grid([to_float(generated)], labels, 1, real))


def _load_in_order(job: ScoreJob, kind: str, rows: Sequence[int]) -> Tensor:
    """Load the images of rows, which may repeat, in the given order."""
    images, kept = score_chunks.load_images(job, kind, sorted(set(rows)))
    index = {row: i for i, row in enumerate(kept.tolist())}
    return to_float(images[[index[row] for row in rows]])
