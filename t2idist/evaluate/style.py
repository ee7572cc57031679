"""Does inverted noise hold the style of a picture? ``python -m t2idist.evaluate.style --export URL``.

The measure of GAN-CLS (Reed et al. 2016, section 5.1): pictures are clustered by their background, and pairs of one
cluster are told from pairs of two by the cosine of what the style encoder says of both; the area under the ROC curve,
0.5 by chance. Sentence vectors stand beside as the baseline, as in the paper: a caption should say little of the style.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from t2idist import storage
from t2idist.config import DataConfig
from t2idist.config.strict import from_dict
from t2idist.contract import Batch, SupportsInvert, System, to_float
from t2idist.data.loader import load_split
from t2idist.data.sources import open_dataset
from t2idist.nn.text_encoders import sentence_vectors
from t2idist.sampling.loading import Loaded, load

BORDER = 8
"""The background is the frame of a picture, one part in so many of its height on each side."""
ROUNDS = 100
MOST_POINTS = 201
ROWS_AT_ONCE = 128


@dataclass(frozen=True)
class Verification:
    """auc: mean over folds of the area under the ROC curve. fold_std: its standard deviation over them. folds: that
    had pairs of both kinds. n: samples. roc: (false positive rate, true positive rate) of the pairs of all folds."""

    auc: float
    fold_std: float
    folds: int
    n: int
    roc: tuple[tuple[float, float], ...]


# ------------------------------------------------------------ the measure
def verify(codes: Tensor, labels: Tensor, *, folds: int = 5, seed: int = 0) -> Verification:
    """How well the cosine of two codes tells whether their labels are equal.

    codes (n, D), labels (n,). The samples are parted at random into `folds`; all pairs inside a fold count. Cosines
    that are equal to nine digits tie, so codes that are all alike score 0.5. Raises ValueError where no fold has pairs
    of one label and pairs of two.
    """
    n = len(labels)
    if codes.dim() != 2 or len(codes) != n:
        raise ValueError(f"style: codes {tuple(codes.shape)} and labels {tuple(labels.shape)}; give one row for each")
    if folds < 1:
        raise ValueError(f"style: {folds} folds; give at least 1")
    unit = functional.normalize(codes.detach().double().cpu(), dim=1)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    scores, same, areas = [], [], []
    for rows in order.tensor_split(folds):
        first, second = torch.triu_indices(len(rows), len(rows), offset=1)
        in_fold = labels.cpu()[rows]
        alike = in_fold[first] == in_fold[second]
        if not alike.any() or alike.all():
            continue
        cosine = (unit[rows] @ unit[rows].T)[first, second]
        scores.append(cosine)
        same.append(alike)
        areas.append(area_under(*roc_curve(cosine, alike)))
    if not areas:
        raise ValueError(f"style: {n} samples in {folds} folds give no pairs of one label and of two in any fold")
    false_positive, true_positive = roc_curve(torch.cat(scores), torch.cat(same))
    kept = torch.linspace(0, len(false_positive) - 1, min(len(false_positive), MOST_POINTS)).round().long()
    points = torch.stack([false_positive[kept], true_positive[kept]], 1).tolist()
    spread = torch.tensor(areas, dtype=torch.float64).std(correction=0).item()
    return Verification(sum(areas) / len(areas), spread, len(areas), n, tuple((x, y) for x, y in points))


def roc_curve(scores: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """False and true positive rates at every threshold on the scores (m,), from (0, 0) to (1, 1); same (m,) bool."""
    _, place = torch.unique(-scores.double().round(decimals=9), return_inverse=True)
    hits = torch.zeros(int(place.max()) + 1, dtype=torch.float64).index_add_(0, place, same.double())
    misses = torch.zeros_like(hits).index_add_(0, place, (~same).double())
    start = torch.zeros(1, dtype=torch.float64)
    return (
        torch.cat([start, misses.cumsum(0) / misses.sum()]),
        torch.cat([start, hits.cumsum(0) / hits.sum()]),
    )


def area_under(false_positive: Tensor, true_positive: Tensor) -> float:
    """Of a ROC curve, by trapezia, which counts a tie as half a success."""
    return float(torch.trapezoid(true_positive, false_positive))


# ------------------------------------------------------------ styles
def background_colours(images: Tensor) -> Tensor:
    """(n, 3): the mean colour of the frame of pictures (n, 3, S, S), uint8 or in [-1, 1]."""
    pictures = to_float(images)
    width = max(1, pictures.shape[-1] // BORDER)
    frame = torch.ones(pictures.shape[-2:], dtype=torch.bool)
    frame[width:-width, width:-width] = False
    return pictures[:, :, frame].mean(2)


def cluster(points: Tensor, clusters: int, *, seed: int = 0) -> Tensor:
    """(n,): the cluster of each point (n, D) by K-means, from centres that are drawn far apart (k-means++).

    Raises ValueError where there are more clusters than different points.
    """
    different = len(torch.unique(points, dim=0))
    if not 2 <= clusters <= different:
        raise ValueError(f"--clusters {clusters}: allowed are 2 to {different}, the different samples there are")
    points = points.double()
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < clusters:
        nearest = torch.cdist(points, centres).amin(1).square()
        centres = torch.cat([centres, points[torch.multinomial(nearest, 1, generator=generator)]])
    nearest_centre = torch.cdist(points, centres).argmin(1)
    for _ in range(ROUNDS):
        sums = torch.zeros_like(centres).index_add_(0, nearest_centre, points)
        counts = torch.bincount(nearest_centre, minlength=clusters).unsqueeze(1)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
        moved = torch.cdist(points, centres).argmin(1)
        if torch.equal(moved, nearest_centre):
            break
        nearest_centre = moved
    return nearest_centre


def numbered(labels: Mapping[str, Any], ids: Sequence[str], where: str) -> tuple[Tensor, Tensor]:
    """Rows of the samples that have a label, and its number for each. Raises ValueError where none has one."""
    rows = [row for row, key in enumerate(ids) if key in labels]
    if not rows:
        raise ValueError(f"{where}: has a label for none of the {len(ids)} samples")
    numbers: dict[str, int] = {}
    found = [numbers.setdefault(str(labels[ids[row]]), len(numbers)) for row in rows]
    return torch.tensor(rows), torch.tensor(found)


# ------------------------------------------------------------ the command
def can_invert(system: System) -> bool:
    """Whether the system finds the noise of a picture (contract.Inverts)."""
    return callable(getattr(system, "invert", None))


def codes_of(loaded: Loaded, batch: Batch) -> dict[str, Tensor]:
    """Of every sample the inverted noise (n, z_dim) and the sentence vector (n, D) of its caption, by name."""
    inverted, read = [], []
    with torch.inference_mode():
        for start in range(0, len(batch.ids), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            captions = batch.captions[rows]
            inverted.append(cast(SupportsInvert, loaded.system).invert(loaded.nets, to_float(batch.images[-1][rows])))
            encoder = loaded.nets.get("text")
            read.append(sentence_vectors(encoder, captions.tokens, captions.lengths, captions.vectors, unit=False))
    return {"inverted noise": torch.cat(inverted), "sentence vector": torch.cat(read)}


def main(words: Sequence[str] | None = None) -> int:
    """The command; gives the exit status: 0, or 2 with one sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m t2idist.evaluate.style",
        description="Tell pictures of one style from pictures of two by their inverted noise.",
    )
    parser.add_argument("--export", required=True, metavar="URL", help="folder of an export of system style")
    parser.add_argument("--data", metavar="SOURCE", help="data set (default: the one that it was trained on)")
    parser.add_argument("--split", default="test", help="of the data set (default: test)")
    parser.add_argument("--labels", metavar="FILE", help="JSON: a style by sample key (default: background colours)")
    parser.add_argument("--clusters", type=int, default=100, help="of background colours (default: 100, the paper's)")
    parser.add_argument("--folds", type=int, default=5, help="that the result is the mean of (default: 5)")
    parser.add_argument("--limit", type=int, help="at most so many samples (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of clusters, folds and limit (default: 0)")
    parser.add_argument("--out", default="style.json", metavar="FILE", help="for the curves (default: style.json)")
    arguments = parser.parse_args(words)
    try:
        rows = _score(arguments)
    except ValueError as error:
        print(f"style: {error}", file=sys.stderr)
        return 2
    for name, row in rows.items():
        print(f"{name:16} AUC {row['auc']:.3f} +- {row['fold_std']:.3f} ({row['n']} samples, {row['folds']} folds)")
    storage.write_json(arguments.out, rows)
    print(f"curves in {storage.redact(arguments.out)}; 0.5 is chance")
    return 0


def _score(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    loaded = load(arguments.export, torch.device("cpu"))
    where = storage.redact(arguments.export)
    if not can_invert(loaded.system):
        raise ValueError(f"{where}: system {loaded.name} does not invert pictures; give the export of a style stage")
    settings = from_dict(DataConfig, loaded.meta["data"]["settings"], f"{where}: data")
    if arguments.data:
        settings = dataclasses.replace(settings, source=arguments.data)
    dataset = dataclasses.replace(open_dataset(settings), vocabulary=loaded.vocabulary)
    batch = load_split(
        dataset,
        arguments.split,
        sizes=loaded.system.sizes,
        max_words=loaded.plan.max_words,
        limit=arguments.limit,
        seed=arguments.seed,
        crop=settings.crop,
    ).batch
    if arguments.labels:
        try:
            labels = storage.read_json(arguments.labels)
        except (OSError, ValueError) as error:
            raise ValueError(f"--labels {arguments.labels}: {error}") from None
        if not isinstance(labels, dict):
            raise ValueError(f"--labels {arguments.labels}: expected a JSON object of sample keys")
        rows, styles = numbered(labels, batch.ids, f"--labels {arguments.labels}")
    else:
        rows = torch.arange(len(batch.ids))
        styles = cluster(background_colours(batch.images[-1]), arguments.clusters, seed=arguments.seed)
    codes = codes_of(loaded, batch)
    return {
        name: dataclasses.asdict(verify(code[rows], styles, folds=arguments.folds, seed=arguments.seed))
        for name, code in codes.items()
    }


if __name__ == "__main__":
    sys.exit(main())
