"""Do the scores see what they should? ``python tools/check_scores.py --data SOURCE [--n 500]``.

Real pictures of a data set are scored as if they had been generated: as they are, blurred, noised, and with captions of
other pictures. What is worse must score worse; the exit status is 1 where it does not.
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
from tqdm import tqdm

from t2idist.config import DataConfig
from t2idist.data.loader import load_split
from t2idist.data.shards import Dataset
from t2idist.data.sources import open_dataset
from t2idist.evaluate.caption_space import CaptionSpace
from t2idist.evaluate.distribution_metrics import fid, kid, neighbours
from t2idist.evaluate.feature_extractors import DEFAULT, EXTRACTORS, Extractor, Weights, open_extractor
from t2idist.evaluate.r_precision import RPrecision, r_precision

AT_ONCE = 64
SUBSETS_OF = 0.8
"""KID's subsets, as a share of the pictures."""


@dataclass(frozen=True)
class Row:
    name: str
    fid: float
    kid: float
    precision: float
    coverage: float


def main(words: Sequence[str] | None = None) -> int:
    """The command; gives the exit status: 0, 1 where a score did not see what it should, 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="SOURCE", help="emoji, avatars, or the URL of a shard set")
    parser.add_argument("--n", type=int, default=500, help="pictures on either side (default: 500)")
    parser.add_argument("--train", type=int, default=2000, help="that the space of captions is fitted on")
    parser.add_argument("--size", type=int, default=128, help="pixels of the pictures (default: 128)")
    parser.add_argument("--extractor", default=DEFAULT, choices=tuple(EXTRACTORS))
    parser.add_argument("--weights", default="", metavar="URL")
    parser.add_argument("--weights-sha256", default="", metavar="HEX")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    try:
        given = Weights(arguments.weights, arguments.weights_sha256)
        extractor = open_extractor(arguments.extractor, given, torch.device("cpu"))
        dataset = open_dataset(DataConfig(source=arguments.data, crop=1.0))
        wrong = check(dataset, extractor, arguments.n, arguments.train, arguments.size)
    except ValueError as error:
        print(f"check_scores: {error}", file=sys.stderr)
        return 2
    for sentence in wrong:
        print(f"check_scores: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


def check(dataset: Dataset, extractor: Extractor, n: int, train: int, size: int) -> list[str]:
    """Print the tables; gives a sentence for everything that came out in the wrong order.

    The two sides are halves of what was drawn from test, or from val, or from train where those are too small.
    """
    large = [name for name in ("test", "val") if name in dataset.splits and len(dataset.split(name)) >= 2 * n]
    split = large[0] if large else "train"
    taken = load_split(dataset, split, sizes=(size,), max_words=1, rows=_rows(dataset, split, 0, 2 * n), crop=1.0)
    if len(taken.captions) < 2 * n:
        raise ValueError(f"--n {n}: split {split} has {len(taken.captions)} pictures, and two sides take {2 * n}")
    order = torch.randperm(2 * n, generator=torch.Generator().manual_seed(0))
    images = taken.batch.images[-1][order]
    captions = [taken.captions[row] for row in order.tolist()]
    classes = taken.batch.class_ids[order]
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "as they are": lambda x: x,
        "blurred, 1 px": lambda x: _each(x, lambda one: one.filter(ImageFilter.GaussianBlur(size / 128))),
        "blurred, 3 px": lambda x: _each(x, lambda one: one.filter(ImageFilter.GaussianBlur(3 * size / 128))),
        "noise of 10": lambda x: _noised(x, 10),
        "noise of 40": lambda x: _noised(x, 40),
    }
    real = _features(extractor, images[:n])
    rows, plain = [], real
    for name, way in ways.items():
        seen = _features(extractor, way(images[n:]))
        plain = seen if name == "as they are" else plain
        near = neighbours(real, seen)
        distance = kid(real, seen, seed=0, subsets=20, subset_size=max(2, int(SUBSETS_OF * n))).mean
        rows.append(Row(name, fid(real, seen), distance, near.precision, near.coverage))
    print(f"{dataset.source}, split {split}, {n} against {n} pictures of {size} px, {extractor.facts['name']}")
    print(f"{'':16}{'FID':>9}{'KID':>10}{'precision':>11}{'coverage':>10}")
    for row in rows:
        print(f"{row.name:16}{row.fid:9.3f}{row.kid:10.5f}{row.precision:11.3f}{row.coverage:10.3f}")
    wrong = [
        f"{measure}: '{better.name}' {getattr(better, measure):.4g}, '{worse.name}' {getattr(worse, measure):.4g}"
        for chain in (rows[:3], [rows[0], *rows[3:]])
        for better, worse in pairwise(chain)
        for measure in ("fid", "kid")
        if not getattr(better, measure) < getattr(worse, measure)
    ]
    fitted = _rows(dataset, "train", 2 * n if split == "train" else 0, train)
    return wrong + _check_captions(dataset, extractor, plain, captions[n:], classes[n:], fitted, size)


def _rows(dataset: Dataset, split: str, start: int, count: int) -> list[int]:
    """So many samples of a split from a place on in an order drawn once, in the split's own order."""
    order = torch.randperm(len(dataset.split(split)), generator=torch.Generator().manual_seed(0))
    return sorted(order[start : start + count].tolist())


def _check_captions(
    dataset: Dataset,
    extractor: Extractor,
    seen: Tensor,
    captions: Sequence[Sequence[str]],
    classes: Tensor,
    rows: Sequence[int],
    size: int,
) -> list[str]:
    if not rows:
        raise ValueError(f"--n {len(captions)}: no training pictures are left to fit the space of captions on")
    fitted = load_split(dataset, "train", sizes=(size,), max_words=1, rows=rows, crop=1.0)
    space = CaptionSpace(_features(extractor, fitted.batch.images[-1]), fitted.captions, seed=0)
    places = space.place(seen)
    said = torch.stack([space.read(of_picture).mean(0) for of_picture in captions])  # all that is said of a picture
    n = len(said)
    found: dict[str, RPrecision] = {}
    for name, moved in (("own captions", 0), ("half of them moved", n // 2), ("all moved", n)):
        given = [(row + n // 2 + 1) % n if row < moved else row for row in range(n)]
        found[name] = r_precision(places, said[given], seed=0, class_ids=classes)
    print(f"R-precision by ridge regression, fitted on {len(fitted.captions)} pictures")
    for name, score in found.items():
        print(f"{name:20}{score.mean:8.3f} +- {score.standard_error:.3f}  chance {score.chance:.3f}")
    own, half, none = found.values()
    wrong = [] if own.mean > half.mean > none.mean else ["R-precision does not fall with the captions that were moved"]
    if abs(none.mean - none.chance) > 3 * none.standard_error + 1 / n:
        wrong.append(f"R-precision of captions of other pictures is {none.mean:.3f}, and chance {none.chance:.3f}")
    return wrong


def _features(extractor: Extractor, images: Tensor) -> Tensor:
    starts = tqdm(range(0, len(images), AT_ONCE), unit="batch", leave=False, file=sys.stderr)
    return torch.cat([extractor(images[start : start + AT_ONCE]).features for start in starts])


def _each(images: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    pictures = (change(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images)
    return torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])


def _noised(images: Tensor, sigma: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * sigma
    return (images.float() + noise).round().clamp(0, 255).byte()


if __name__ == "__main__":
    sys.exit(main())
