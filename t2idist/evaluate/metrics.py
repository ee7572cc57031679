"""The numbers of a scoring: what `scoring` gathered, measured; and whose captions and attributes are followed best."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor

from t2idist.data.shards import Dataset
from t2idist.data.tokenizer import tokenise
from t2idist.evaluate import score_chunks
from t2idist.evaluate.caption_space import CaptionSpace
from t2idist.evaluate.distribution_metrics import bootstrap_error, fid, inception_score, kid, nearest, neighbours
from t2idist.evaluate.r_precision import RPrecision, most_candidates, r_precision
from t2idist.evaluate.score_chunks import GENERATED, REAL, TRAIN, Gathered, Reads, ScoreJob

READ_BY = {"clip_r": "clip", "damsm_r": "damsm"}
"""R-precisions by something that reads captions itself, and its name among the looks."""
NEEDS_TRAIN = ("r_precision", "memorisation")
KID_SUBSET = 1000
NEIGHBOURS = 5
CANDIDATES = 100
RAREST = 20
"""A word or an attribute that fewer pictures have gets no row of its own."""
NORMAL_95 = 1.96


@dataclass(frozen=True)
class Score:
    """One row. error: as `note` says. low, high: the 95 % interval, where the error is a standard error. real, chance:
    what real pictures and a blind choice score, where that is known."""

    name: str
    value: float
    error: float | None
    low: float | None
    high: float | None
    real: float | None
    chance: float | None
    n: int
    note: str


@dataclass(frozen=True)
class Options:
    """How to measure. background: class 0 of the classifier counts for nothing. kid_subset: 0: 1000, or half of what
    there is.

    bootstrap: draws for standard errors (0: none).
    """

    background: bool = False
    splits: int = 10
    kid_subset: int = 0
    bootstrap: int = 20


@dataclass(frozen=True)
class Ranks:
    """An R-precision. captions: of each generated picture; samples: of the split, of each."""

    name: str
    ours: RPrecision
    real: RPrecision
    captions: tuple[str, ...]
    samples: tuple[int, ...]


def check(job: ScoreJob, options: Options, metrics: Sequence[str], dataset: Dataset) -> None:
    """Whether there are enough pictures. Raises ValueError, one sentence, before any of them is drawn."""
    there, fewest = f"there are {job.real} real and {job.n} generated pictures", min(job.real, job.n)
    if "kid" in metrics and fewest < options.kid_subset:
        raise ValueError(f"--subset {options.kid_subset}: {there}; give more, or a smaller subset")
    if "prdc" in metrics and fewest < 4 * NEIGHBOURS:
        raise ValueError(f"--metrics prdc: {there}; with {NEIGHBOURS} neighbours it takes at least {4 * NEIGHBOURS}")
    if "is" in metrics and fewest < options.splits:
        raise ValueError(f"--splits {options.splits}: {there}; give more, or fewer splits")
    if fewest < 4:
        raise ValueError(f"--n {job.n}: {there}; at least 4 are needed")
    by_caption = [name for name in metrics if name == "r_precision" or name in READ_BY]
    for kind in (GENERATED, REAL) if by_caption else ():
        rows = score_chunks.rows_of(kind, job, len(dataset.split(job.split)))
        most = most_candidates(score_chunks.classes_of(dataset, job.split, rows.samples))
        if most < CANDIDATES:
            raise ValueError(
                f"--metrics {by_caption[0]}: a picture picks its caption out of {CANDIDATES} of other classes, and the "
                f"{kind} pictures give one of them only {most}; give more"
            )


class Measures:
    """Of one job whose pieces are all done."""

    def __init__(self, job: ScoreJob, options: Options, dataset: Dataset, folder: str) -> None:
        self._job, self._options, self._dataset = job, options, dataset
        self.generated = score_chunks.gather(job, GENERATED, folder)
        self.real = score_chunks.gather(job, REAL, folder)
        self.train = score_chunks.gather(job, TRAIN, folder) if job.train else None
        self.ranks: list[Ranks] = []

    def rows(self, metrics: Sequence[str]) -> list[Score]:
        """Of all metrics, in order. Raises ValueError, one sentence, where one cannot be had."""
        makers: dict[str, Callable[[], list[Score]]] = {
            "fid": self._fid,
            "kid": self._kid,
            "is": self._inception,
            "prdc": self._neighbours,
            "r_precision": self._r_by_features,
            "memorisation": self._memorisation,
        }
        return [row for name in metrics for row in (makers[name]() if name in makers else self._r_by_reader(name))]

    def _fid(self) -> list[Score]:
        real, drawn = self.real.seen[0].features, self.generated.seen[0].features
        value, halves = fid(real, drawn), _halves(real, self._job.seed)
        error, note = None, f"{len(real)} real pictures; real: one half of them against the other"
        if self._options.bootstrap > 1:
            times = self._options.bootstrap
            error = bootstrap_error(lambda rows: fid(real, drawn[rows]), len(drawn), seed=self._job.seed, times=times)
            note += f"; error: standard error, {times} bootstrap draws"
        return [_row("fid", value, error, len(drawn), note, real=fid(*halves))]

    def _kid(self) -> list[Score]:
        real, drawn = self.real.seen[0].features, self.generated.seen[0].features
        subset = self.kid_subset
        found = kid(real, drawn, seed=self._job.seed, subset_size=subset)
        halves = _halves(real, self._job.seed)
        of_real = kid(*halves, seed=self._job.seed, subset_size=min(subset, len(halves[0]))).mean
        note = f"100 subsets of {subset}; error: their deviation; real: one half of the real ones against the other"
        return [Score("kid", found.mean, found.std, None, None, of_real, None, len(drawn), note)]

    @property
    def kid_subset(self) -> int:
        there = min(len(self.real.rows), len(self.generated.rows))
        return self._options.kid_subset or min(KID_SUBSET, there // 2)

    def _inception(self) -> list[Score]:
        if not self.generated.seen[0].logits.shape[1]:
            raise ValueError(f"--metrics is: extractor {self._job.looks[0].name} has no classifier")
        scores = []
        for gathered in (self.generated, self.real):
            logits = gathered.seen[0].logits[:, 1:] if self._options.background else gathered.seen[0].logits
            order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(self._job.seed))
            scores.append(inception_score(logits, splits=self._options.splits, order=order))
        ours, real = scores
        note = f"{self._options.splits} splits; error: their deviation"
        return [Score("is", ours.mean, ours.std, None, None, real.mean, None, len(self.generated.rows), note)]

    def _neighbours(self) -> list[Score]:
        drawn, real = self.generated.seen[0].features, self.real.seen[0].features
        found = asdict(neighbours(real, drawn, nearest=NEIGHBOURS))
        halves = asdict(neighbours(*_halves(real, self._job.seed), nearest=NEIGHBOURS))
        note = f"{NEIGHBOURS} neighbours; real: one half of the real ones against the other"
        return [_row(name, value, None, len(drawn), note, real=halves[name]) for name, value in found.items()]

    def _memorisation(self) -> list[Score]:
        """How near pictures come to the nearest training picture, in units of how near real unseen ones come."""
        train = cast(Gathered, self.train).seen[0].features
        ours, real = (nearest(gathered.seen[0].features, train).distance for gathered in (self.generated, self.real))
        scale = float(real.median())
        note = (
            f"median distance to the nearest of {len(train)} training pictures, over that of real test pictures; "
            "near 0: copies"
        )
        return [_row("nearest_train", float(ours.median()) / scale, None, len(ours), note, real=1.0)]

    # -------------------------------------------------------- R-precision
    def _r_by_features(self) -> list[Score]:
        """By a space that was fitted on real training pictures."""
        train, of_train = cast(Gathered, self.train), self._dataset.split("train")
        samples = score_chunks.rows_of(TRAIN, self._job, len(of_train)).samples
        said = [of_train.captions(samples[row]) for row in train.rows.tolist()]
        space = CaptionSpace(train.seen[0].features, said, seed=self._job.seed)
        note = f"ridge regression from features to captions, fitted on {len(said)} training pictures"
        return [self._r("r_precision", space.read, lambda gathered: space.place(gathered.seen[0].features), note)]

    def _r_by_reader(self, name: str) -> list[Score]:
        number = next(i for i, look in enumerate(self._job.looks) if look.name == READ_BY[name])
        reader = cast(Reads, score_chunks.looker(self._job, number))
        note = "by CLIP" if name == "clip_r" else "by a DAMSM: the published protocol"
        return [self._r(name, reader.read, lambda gathered: gathered.seen[number].features, note)]

    def _r(
        self, name: str, read: Callable[[Sequence[str]], Tensor], place: Callable[[Gathered], Tensor], note: str
    ) -> Score:
        found = []
        of_split = self._dataset.split(self._job.split)
        for kind, gathered in ((GENERATED, self.generated), (REAL, self.real)):
            rows = score_chunks.rows_of(kind, self._job, len(of_split))
            samples = [rows.samples[row] for row in gathered.rows.tolist()]
            passes = [rows.passes[row] for row in gathered.rows.tolist()]
            captions = [
                score_chunks.caption_of(self._dataset, self._job.split, *one)
                for one in zip(samples, passes, strict=True)
            ]
            classes = score_chunks.classes_of(self._dataset, self._job.split, samples)
            score = r_precision(
                place(gathered), read(captions), seed=self._job.seed, class_ids=classes, candidates=CANDIDATES
            )
            found.append((score, captions, samples))
        (ours, captions, samples), (real, _, _) = found
        self.ranks.append(Ranks(name, ours, real, tuple(captions), tuple(samples)))
        note = f"own caption out of {ours.candidates}, {note}; error: standard error"
        return _row(name, ours.mean, ours.standard_error, ours.n, note, real=real.mean, chance=ours.chance)

    # -------------------------------------------------------- whose captions are followed
    def breakdown(self) -> dict[str, list[dict[str, Any]]]:
        """Every R-precision of the pictures whose caption has a word, or whose sample an attribute.

        Rows with "name", "n" and a value by each metric's name, lowest first; words and attributes of fewer than
        `RAREST` pictures are left out, and what all have.
        """
        if not self.ranks:
            return {}
        of_split = self._dataset.split(self._job.split)
        having: dict[str, dict[str, list[int]]] = {"words": defaultdict(list), "attributes": defaultdict(list)}
        for row, (caption, sample) in enumerate(zip(self.ranks[0].captions, self.ranks[0].samples, strict=True)):
            for word in set(tokenise(caption)):
                having["words"][word].append(row)
            for attribute in of_split.attributes(sample):
                having["attributes"][attribute].append(row)
        found: dict[str, list[dict[str, Any]]] = {}
        for kind, of_kind in having.items():
            common = {name: rows for name, rows in of_kind.items() if RAREST <= len(rows) < self.ranks[0].ours.n}
            rows_of = {
                name: {"name": name, "n": len(rows), **{r.name: float(r.ours.hits[rows].mean()) for r in self.ranks}}
                for name, rows in common.items()
            }
            found[kind] = sorted(rows_of.values(), key=lambda row: (sum(row[r.name] for r in self.ranks), row["name"]))
        return found


def _row(
    name: str,
    value: float,
    error: float | None,
    n: int,
    note: str,
    *,
    real: float | None = None,
    chance: float | None = None,
) -> Score:
    """A row whose error is a standard error."""
    reach = None if error is None else NORMAL_95 * error
    low, high = (None, None) if reach is None else (value - reach, value + reach)
    return Score(name, value, error, low, high, real, chance, n, note)


def _halves(features: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    half = len(features) // 2
    return features[order[:half]], features[order[half : 2 * half]]
