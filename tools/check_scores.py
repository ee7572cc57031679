"""Check that scores detect defects: ``python tools/check_scores.py --data SOURCE [--n 500]``.

Real images of a data set are scored as if they were generated: unchanged, blurred, with noise, and with captions of
other images. A worse set must have a worse score; otherwise the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from t2idist.config import DataConfig
from t2idist.data.loader import load_split
from t2idist.data.shards import Dataset
from t2idist.data.sources import open_dataset
from t2idist.evaluate.distribution_metrics import fid, kid, precision_recall
from t2idist.evaluate.feature_extractors import DEFAULT, EXTRACTORS, FeatureExtractor, WeightsFile, open_extractor
from t2idist.evaluate.r_precision import CaptionSpace, RPrecision, r_precision
from t2idist.observability.command import BAD_INPUT, command
from t2idist.observability.progress_bar import track

BATCH_SIZE = 64
SUBSET_SHARE = 0.8
"""Size of KID's subsets as a share of the images."""


@dataclass(frozen=True)
class Row:
    name: str
    fid: float
    kid: float
    precision: float
    coverage: float


@command("check_scores", failed=BAD_INPUT)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status: 0, 1 if a score missed a defect, 2 for any error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="SOURCE", help="emoji, avatars, or the URL of a shard set")
    parser.add_argument("--n", type=int, default=500, help="images of each of the two sets (default: 500)")
    parser.add_argument("--train", type=int, default=2000, help="images for the caption space (default: 2000)")
    parser.add_argument("--size", type=int, default=128, help="size of the images in pixels (default: 128)")
    parser.add_argument("--extractor", default=DEFAULT, choices=tuple(EXTRACTORS))
    parser.add_argument("--weights", default="", metavar="URL")
    parser.add_argument("--weights-sha256", default="", metavar="HEX")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    weights = WeightsFile(options.weights, options.weights_sha256)
    extractor = open_extractor(options.extractor, weights, torch.device("cpu"))
    dataset = open_dataset(DataConfig(source=options.data, crop=1.0))
    failures = check(dataset, extractor, options.n, options.train, options.size)
    for failure in failures:
        print(f"check_scores: {failure}", file=sys.stderr)
    return 1 if failures else 0


def check(dataset: Dataset, extractor: FeatureExtractor, n: int, train: int, size: int) -> list[str]:
    """Print the scores; returns a sentence for every pair in the wrong order.

    The two sets are halves of samples of test or val, or of train if those are too small.
    """
    large = [name for name in ("test", "val") if name in dataset.splits and len(dataset.split(name)) >= 2 * n]
    split = large[0] if large else "train"
    loaded = load_split(dataset, split, sizes=(size,), max_words=1, rows=_rows(dataset, split, 0, 2 * n), crop=1.0)
    if len(loaded.captions) < 2 * n:
        raise ValueError(f"--n {n}: split {split} has {len(loaded.captions)} images, and two sets need {2 * n}")
    order = torch.randperm(2 * n, generator=torch.Generator().manual_seed(0))
    images = loaded.batch.images[-1][order]
    captions = [loaded.captions[row] for row in order.tolist()]
    class_ids = loaded.batch.class_ids[order]
    defects: dict[str, Callable[[Tensor], Tensor]] = {
        "as they are": lambda x: x,
        "blurred, 1 px": lambda x: _apply(x, lambda image: image.filter(ImageFilter.GaussianBlur(size / 128))),
        "blurred, 3 px": lambda x: _apply(x, lambda image: image.filter(ImageFilter.GaussianBlur(3 * size / 128))),
        "noise of 10": lambda x: _add_noise(x, 10),
        "noise of 40": lambda x: _add_noise(x, 40),
    }
    real = _features(extractor, images[:n])
    rows, unchanged = [], real
    for name, apply in defects.items():
        features = _features(extractor, apply(images[n:]))
        unchanged = features if name == "as they are" else unchanged
        neighbours = precision_recall(real, features)
        distance = kid(real, features, seed=0, subsets=20, subset_size=max(2, int(SUBSET_SHARE * n))).mean
        rows.append(Row(name, fid(real, features), distance, neighbours.precision, neighbours.coverage))
    print(f"{dataset.source}, split {split}, {n} against {n} images of {size} px, {extractor.facts['name']}")
    print(f"{'':16}{'FID':>9}{'KID':>10}{'precision':>11}{'coverage':>10}")
    for row in rows:
        print(f"{row.name:16}{row.fid:9.3f}{row.kid:10.5f}{row.precision:11.3f}{row.coverage:10.3f}")
    failures = [
        f"{metric}: '{better.name}' {getattr(better, metric):.4g}, '{worse.name}' {getattr(worse, metric):.4g}"
        for chain in (rows[:3], [rows[0], *rows[3:]])
        for better, worse in pairwise(chain)
        for metric in ("fid", "kid")
        if not getattr(better, metric) < getattr(worse, metric)
    ]
    fit_rows = _rows(dataset, "train", 2 * n if split == "train" else 0, train)
    return failures + _check_captions(dataset, extractor, unchanged, captions[n:], class_ids[n:], fit_rows, size)


def _rows(dataset: Dataset, split: str, start: int, count: int) -> list[int]:
    """Return `count` rows of a fixed random order of a split, from position `start`; sorted."""
    order = torch.randperm(len(dataset.split(split)), generator=torch.Generator().manual_seed(0))
    return sorted(order[start : start + count].tolist())


def _check_captions(
    dataset: Dataset,
    extractor: FeatureExtractor,
    features: Tensor,
    captions: Sequence[Sequence[str]],
    class_ids: Tensor,
    fit_rows: Sequence[int],
    size: int,
) -> list[str]:
    if not fit_rows:
        raise ValueError(f"--n {len(captions)}: no training images are left to fit the caption space to")
    train = load_split(dataset, "train", sizes=(size,), max_words=1, rows=fit_rows, crop=1.0)
    space = CaptionSpace(_features(extractor, train.batch.images[-1]), train.captions, seed=0)
    image_embeddings = space.embed_images(features)
    caption_embeddings = torch.stack([space.embed_captions(of_image).mean(0) for of_image in captions])
    n = len(caption_embeddings)
    results: dict[str, RPrecision] = {}
    for name, moved in (("own captions", 0), ("half of them moved", n // 2), ("all moved", n)):
        caption_rows = [(row + n // 2 + 1) % n if row < moved else row for row in range(n)]
        results[name] = r_precision(image_embeddings, caption_embeddings[caption_rows], seed=0, class_ids=class_ids)
    print(f"R-precision by ridge regression, fitted to {len(train.captions)} images")
    for name, result in results.items():
        print(f"{name:20}{result.mean:8.3f} +- {result.standard_error:.3f}  chance {result.chance:.3f}")
    own, half, none = results.values()
    failures = []
    if not own.mean > half.mean > none.mean:
        failures.append("R-precision does not fall with the share of wrong captions")
    if abs(none.mean - none.chance) > 3 * none.standard_error + 1 / n:
        failures.append(f"R-precision of wrong captions is {none.mean:.3f}, and chance {none.chance:.3f}")
    return failures


def _features(extractor: FeatureExtractor, images: Tensor) -> Tensor:
    with track(range(0, len(images), BATCH_SIZE), "batch") as starts:
        return torch.cat([extractor(images[start : start + BATCH_SIZE]).features for start in starts])


def _apply(images: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    changed = (change(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images)
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in changed])


def _add_noise(images: Tensor, sigma: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * sigma
    return (images.float() + noise).round().clamp(0, 255).byte()


if __name__ == "__main__":
    sys.exit(main())
