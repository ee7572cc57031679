"""Pictures that stand beside scores: whose captions are followed best and worst, and what is nearest in training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from t2idist import storage
from t2idist.contract import to_float
from t2idist.data.shards import Dataset
from t2idist.evaluate import score_chunks
from t2idist.evaluate.distribution_metrics import nearest
from t2idist.evaluate.metrics import Measures, Ranks
from t2idist.evaluate.score_chunks import GENERATED, REAL, TRAIN, ScoreJob
from t2idist.sampling.figures import grid, png_bytes

ROWS = 8


def write(job: ScoreJob, measures: Measures, dataset: Dataset, folder: str) -> dict[str, str]:
    """Write the sheets that the measures allow; gives their file names by what they show."""
    made: dict[str, bytes] = {}
    if measures.ranks:
        ranks = measures.ranks[0]
        order = torch.argsort(ranks.ours.margins, stable=True).tolist()
        for name, rows in (("worst", order[:ROWS]), ("best", order[::-1][:ROWS])):
            made[name] = _captions_sheet(job, measures, dataset, ranks, rows)
    if measures.train is not None:
        made["nearest"] = _nearest_sheet(job, measures)
    for name, data in made.items():
        storage.write_bytes(storage.join(folder, f"{name}.png"), data)
    return {name: f"{name}.png" for name in made}


def _captions_sheet(job: ScoreJob, measures: Measures, dataset: Dataset, ranks: Ranks, rows: Sequence[int]) -> bytes:
    """Pictures of captions, beside a real picture of each where it was looked at."""
    drawn, _ = score_chunks.pictures(job, GENERATED, measures.generated.rows[list(rows)].tolist())
    of_real = score_chunks.rows_of(REAL, job, len(dataset.split(job.split))).samples
    looked_at = {of_real[row]: row for row in measures.real.rows.tolist()}
    wanted = [ranks.samples[row] for row in rows]
    real = None
    if all(sample in looked_at for sample in wanted):
        real = _in_order(job, REAL, [looked_at[sample] for sample in wanted])
    return png_bytes(grid([to_float(drawn)], [ranks.captions[row] for row in rows], 1, real))


def _nearest_sheet(job: ScoreJob, measures: Measures) -> bytes:
    """The generated pictures that are nearest to a training picture, beside it."""
    assert measures.train is not None
    found = nearest(measures.generated.seen[0].features, measures.train.seen[0].features)
    rows = torch.argsort(found.distance, stable=True)[:ROWS]
    drawn, _ = score_chunks.pictures(job, GENERATED, measures.generated.rows[rows].tolist())
    real = _in_order(job, TRAIN, measures.train.rows[found.row[rows]].tolist())
    labels = [f"distance {float(found.distance[row]):.3g}; real: the nearest of training" for row in rows]
    return png_bytes(grid([to_float(drawn)], labels, 1, real))


def _in_order(job: ScoreJob, kind: str, rows: Sequence[int]) -> Tensor:
    """Pictures of these rows, one of which may come twice."""
    once = sorted(set(rows))
    images, kept = score_chunks.pictures(job, kind, once)
    place = {row: number for number, row in enumerate(kept.tolist())}
    return to_float(images[[place[row] for row in rows]])
