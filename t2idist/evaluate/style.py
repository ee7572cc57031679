"""Measure whether inverted noise holds the style of an image: the command ``t2idist style``.

The measure is that of GAN-CLS (Reed et al. 2016, section 5.1). Images are clustered by their background; the cosine of
two inverted noise vectors is used to tell pairs of one cluster from pairs of two clusters. The result is the area under
the ROC curve, 0.5 by chance. Sentence vectors are the baseline, as in the paper: a caption should say little of style.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from t2idist import storage
from t2idist.config import DataConfig
from t2idist.config.arguments import command_parser
from t2idist.config.strict import from_dict
from t2idist.contract import Batch, SupportsInvert
from t2idist.data.loader import load_split
from t2idist.data.sources import open_dataset
from t2idist.nn.images import to_float
from t2idist.nn.text_encoders import sentence_vectors
from t2idist.observability.command import command, describe_error
from t2idist.observability.progress_bar import track
from t2idist.sampling.drawings import export_sha256
from t2idist.sampling.loading import LoadedExport, load_export
from t2idist.storage.outputs import check_not_input

BORDER = 8
"""The background is a frame whose width is the image's height divided by this number."""
MAX_ITERATIONS = 100
MAX_CURVE_POINTS = 201
BATCH_SIZE = 128


@dataclass(frozen=True)
class Verification:
    auc: float
    """Mean over the folds of the area under the ROC curve."""
    fold_std: float
    """Standard deviation over the folds."""
    folds: int
    """Number of folds with pairs of both kinds."""
    n: int
    """Number of samples."""
    roc: tuple[tuple[float, float], ...]
    """(false positive rate, true positive rate) of the pairs of all folds."""


# ------------------------------------------------------------ the measure
def verify(codes: Tensor, labels: Tensor, *, folds: int = 5, seed: int = 0) -> Verification:
    """Measure how well the cosine of two codes shows whether their labels are equal.

    All pairs inside a fold count. Cosines that are equal to nine digits tie, so equal codes score 0.5.

    Args:
        codes: (n, D).
        labels: (n,).
        folds: number of random parts of the samples.
        seed: seed of the parts.

    Raises:
        ValueError: no fold has both pairs of one label and pairs of two.
    """
    n = len(labels)
    if codes.dim() != 2 or len(codes) != n:
        raise ValueError(f"style: codes {tuple(codes.shape)} and labels {tuple(labels.shape)}; give one row per label")
    if folds < 1:
        raise ValueError(f"style: {folds} folds; give at least 1")
    unit = functional.normalize(codes.detach().double().cpu(), dim=1)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    scores, same, areas = [], [], []
    for rows in order.tensor_split(folds):
        first, second = torch.triu_indices(len(rows), len(rows), offset=1)
        fold_labels = labels.cpu()[rows]
        equal = fold_labels[first] == fold_labels[second]
        if not equal.any() or equal.all():
            continue
        cosine = (unit[rows] @ unit[rows].T)[first, second]
        scores.append(cosine)
        same.append(equal)
        areas.append(area_under_curve(*roc_curve(cosine, equal)))
    if not areas:
        raise ValueError(f"style: {n} samples in {folds} folds: no fold has both pairs of one label and pairs of two")
    false_positive, true_positive = roc_curve(torch.cat(scores), torch.cat(same))
    kept = torch.linspace(0, len(false_positive) - 1, min(len(false_positive), MAX_CURVE_POINTS)).round().long()
    points = torch.stack([false_positive[kept], true_positive[kept]], 1).tolist()
    fold_std = torch.tensor(areas, dtype=torch.float64).std(correction=0).item()
    return Verification(sum(areas) / len(areas), fold_std, len(areas), n, tuple((x, y) for x, y in points))


def roc_curve(scores: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """Return false and true positive rates, from (0, 0) to (1, 1), at every threshold on the scores.

    Args:
        scores: (m,).
        same: (m,) bool, true for positives.
    """
    _, rank = torch.unique(-scores.double().round(decimals=9), return_inverse=True)
    hits = torch.zeros(int(rank.max()) + 1, dtype=torch.float64).index_add_(0, rank, same.double())
    misses = torch.zeros_like(hits).index_add_(0, rank, (~same).double())
    start = torch.zeros(1, dtype=torch.float64)
    return (
        torch.cat([start, misses.cumsum(0) / misses.sum()]),
        torch.cat([start, hits.cumsum(0) / hits.sum()]),
    )


def area_under_curve(false_positive: Tensor, true_positive: Tensor) -> float:
    """Integrate a ROC curve by the trapezoidal rule, which counts a tie as half a success."""
    return float(torch.trapezoid(true_positive, false_positive))


# ------------------------------------------------------------ styles
def background_colours(images: Tensor) -> Tensor:
    """Return the mean colour of the frame, (n, 3), of images (n, 3, S, S), uint8 or in [-1, 1]."""
    images = to_float(images)
    width = max(1, images.shape[-1] // BORDER)
    frame = torch.ones(images.shape[-2:], dtype=torch.bool)
    frame[width:-width, width:-width] = False
    return images[:, :, frame].mean(2)


def kmeans(points: Tensor, clusters: int, *, seed: int = 0) -> Tensor:
    """Cluster points (n, D) by K-means with k-means++ initialisation; returns the cluster of each point, (n,).

    Raises ValueError if there are more clusters than distinct points.
    """
    distinct = len(torch.unique(points, dim=0))
    if not 2 <= clusters <= distinct:
        raise ValueError(f"--clusters {clusters}: allowed are 2 to {distinct}, the number of distinct samples")
    points = points.double()
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < clusters:
        squared = torch.cdist(points, centres).amin(1).square()
        centres = torch.cat([centres, points[torch.multinomial(squared, 1, generator=generator)]])
    assignment = torch.cdist(points, centres).argmin(1)
    for _ in range(MAX_ITERATIONS):
        sums = torch.zeros_like(centres).index_add_(0, assignment, points)
        counts = torch.bincount(assignment, minlength=clusters).unsqueeze(1)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
        updated = torch.cdist(points, centres).argmin(1)
        if torch.equal(updated, assignment):
            break
        assignment = updated
    return assignment


def label_ids(labels: Mapping[str, Any], keys: Sequence[str], where: str) -> tuple[Tensor, Tensor]:
    """Number the labels of samples.

    Args:
        labels: label by sample key.
        keys: keys of the samples.
        where: name of the labels in error messages.

    Returns:
        Rows of the samples that have a label, and the number of the label of each.

    Raises:
        ValueError: no sample has a label.
    """
    rows = [row for row, key in enumerate(keys) if key in labels]
    if not rows:
        raise ValueError(f"{where}: has no label for any of the {len(keys)} samples")
    numbers: dict[str, int] = {}
    ids = [numbers.setdefault(str(labels[keys[row]]), len(numbers)) for row in rows]
    return torch.tensor(rows), torch.tensor(ids)


# ------------------------------------------------------------ the command
def encode_batch(loaded: LoadedExport, batch: Batch) -> dict[str, Tensor]:
    """Return the inverted noise (n, z_dim) of every sample and the sentence vector (n, D) of its caption, by name."""
    system = loaded.system
    assert isinstance(system, SupportsInvert)
    inverted, vectors = [], []
    with torch.inference_mode(), track(range(0, len(batch.ids), BATCH_SIZE), "batch") as starts:
        for start in starts:
            rows = slice(start, start + BATCH_SIZE)
            captions = batch.captions[rows]
            inverted.append(system.invert(loaded.nets, to_float(batch.images[-1][rows])))
            encoder = loaded.nets.get("text")
            vectors.append(sentence_vectors(encoder, captions.tokens, captions.lengths, captions.vectors, unit=False))
    return {"inverted noise": torch.cat(inverted), "sentence vector": torch.cat(vectors)}


@command("style")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``t2idist style``; returns the exit status."""
    parser = command_parser(
        "style",
        "Measure how well the inverted noise of two images shows whether they have the same style.",
        "t2idist style --export RUN/style/export --clusters 50 --out style.json",
    )
    add = parser.add_argument
    add("--export", required=True, metavar="URL", help="folder of an export of system style")
    add("--data", metavar="SOURCE", help="data set (default: the training data)")
    add("--split", default="test", help="split of the data (default: test)")
    add("--labels", metavar="FILE", help="JSON object, style by sample key (default: clusters of background colours)")
    add("--clusters", type=int, default=100, metavar="N", help="clusters of background colours (default: 100, as Reed)")
    add("--folds", type=int, default=5, metavar="N", help="folds that the result is averaged over (default: 5)")
    add("--limit", type=int, metavar="N", help="largest number of samples (default: all)")
    add("--seed", type=int, default=0, help="seed of clusters, folds and limit (default: 0)")
    add("--out", default="style.json", metavar="FILE", help="file for the curves (default: style.json)")
    options = parser.parse_args(arguments)
    protocol = _protocol(options)
    _check_output(options, protocol)
    rows = {name: {**row, "protocol": protocol} for name, row in _score(options).items()}
    for name, row in rows.items():
        print(f"{name:16} AUC {row['auc']:.3f} +- {row['fold_std']:.3f} ({row['n']} samples, {row['folds']} folds)")
    storage.write_json(options.out, rows)
    print(f"curves in {storage.redact(options.out)}; 0.5 is chance")
    return 0


def _protocol(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the curves depend on."""
    values = {name: vars(options)[name] for name in ("split", "clusters", "folds", "limit", "seed")}
    labels = None if options.labels is None else storage.sha256(json.dumps(_read_labels(options.labels)).encode())
    data = None if options.data is None else storage.redact(options.data)
    return {"export_sha256": export_sha256(options.export), "data": data, "labels_sha256": labels, **values}


def _check_output(options: argparse.Namespace, protocol: Mapping[str, Any]) -> None:
    """Raise ValueError if --out is an input, or a file other than an earlier result of the same protocol."""
    check_not_input(options.out, [options.labels] if options.labels else [], "--out")
    if not storage.exists(options.out):
        return
    try:
        rows = list(storage.read_json(options.out).values())
        same = bool(rows) and all(row["protocol"] == protocol for row in rows)
    except (ValueError, KeyError, TypeError, AttributeError):
        same = False
    if not same:
        raise ValueError(
            f"--out {storage.redact(options.out)}: exists, and is not a result with these options; give another --out"
        )


def _score(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    loaded = load_export(options.export, torch.device("cpu"))
    where = storage.redact(options.export)
    if not isinstance(loaded.system, SupportsInvert):
        raise ValueError(f"{where}: system {loaded.name} does not invert images; give the export of a style stage")
    trained_on = (loaded.meta.get("data") or {}).get("settings")
    if trained_on is None and not options.data:
        raise ValueError(f"--data: required, because {where} does not say what data it was trained on")
    settings = from_dict(DataConfig, trained_on or {}, f"{where}: data")
    if options.data:
        settings = dataclasses.replace(settings, source=options.data)
    dataset = dataclasses.replace(open_dataset(settings), vocabulary=loaded.vocabulary)
    batch = load_split(
        dataset,
        options.split,
        sizes=loaded.system.sizes,
        max_words=loaded.build_info.max_words,
        limit=options.limit,
        seed=options.seed,
        crop=settings.crop,
    ).batch
    if options.labels:
        rows, styles = label_ids(_read_labels(options.labels), batch.ids, f"--labels {storage.redact(options.labels)}")
    else:
        rows = torch.arange(len(batch.ids))
        styles = kmeans(background_colours(batch.images[-1]), options.clusters, seed=options.seed)
    codes = encode_batch(loaded, batch)
    return {
        name: dataclasses.asdict(verify(code[rows], styles, folds=options.folds, seed=options.seed))
        for name, code in codes.items()
    }


def _read_labels(file: str) -> dict[str, Any]:
    try:
        labels = storage.read_json(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"--labels {describe_error(error)}") from None
    if not isinstance(labels, dict):
        raise ValueError(f"--labels {storage.redact(file)}: expected a JSON object of sample keys")
    return labels
