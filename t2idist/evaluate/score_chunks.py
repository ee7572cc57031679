"""The work of scoring in pieces that any process can do in any order, and that give the same numbers wherever they ran.

A piece is up to `PIECE` pictures of one kind, drawn or read and then looked at by every extractor; it is a file of its
own in the work folder, so a scoring that was cut off goes on where it was. Pieces are always cut in the same way: how
many processes there are changes nothing.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from t2idist import storage
from t2idist.config import DataConfig
from t2idist.contract import SupportsEmbed, SupportsSample, to_float, to_uint8
from t2idist.data.loader import load_split
from t2idist.data.order import permutation
from t2idist.data.shards import Dataset
from t2idist.data.sources import open_dataset
from t2idist.engine.checkpoint import export
from t2idist.evaluate.feature_extractors import Clip, Extractor, Seen, Weights, open_extractor
from t2idist.evaluate.monitor import can_draw, can_match, reads_text, reads_vectors
from t2idist.sampling.generate import NormalDraw, encode, generate, no_captions
from t2idist.sampling.loading import Loaded, load

PIECE = 128
MOST_UNKNOWN = 0.5
"""Share of the data's words that an export has to know."""
GENERATED, REAL, TRAIN = "generated", "real", "train"
COUNTS = {GENERATED: "n", REAL: "real", TRAIN: "train"}
"""By kind of pictures, what the job calls how many there are."""


@dataclass(frozen=True)
class ExtractorSpec:
    """What looks at the pictures: an extractor by name, or "damsm" for an export that matches."""

    name: str
    weights: Weights = Weights()


@dataclass(frozen=True)
class ScoreJob:
    """All that tells what is scored; plain values. data: of the real pictures, with the crop of the training.

    pixels: of the pictures that the export draws, and to which the real ones are
    brought. jpeg: the quality at which all pictures, real and generated, are encoded before they are looked at (0: not
    at all). n: generated pictures. real: real ones. train: training pictures (0: none).
    """

    export: str
    export_sha256: str
    own_system: str
    data: DataConfig
    split: str
    pixels: int
    n: int
    real: int
    train: int
    seed: int
    truncation: float | None
    jpeg: int
    looks: tuple[ExtractorSpec, ...]
    device: str

    def split_of(self, kind: str) -> str:
        return "train" if kind == TRAIN else self.split

    def key(self, kind: str) -> str:
        """Of everything that changes a piece of a kind; real pictures are the same for every export of one size."""
        without = {"device", *(count for other, count in COUNTS.items() if other != kind)}
        if kind != GENERATED:
            without |= {"export", "export_sha256", "own_system", "truncation"}
        fixed = {name: value for name, value in asdict(self).items() if name not in without}
        return storage.sha256(json.dumps(fixed, sort_keys=True).encode())[:16]


@dataclass(frozen=True)
class Rows:
    """Which samples of a split: their numbers, and for generated pictures the pass over the split they belong to."""

    samples: tuple[int, ...]
    passes: tuple[int, ...]


@dataclass(frozen=True)
class ScoreChunk:
    """Pictures `start` to `end` of a kind."""

    kind: str
    start: int
    end: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.start:07d}-{self.end:07d}.safetensors"


@functools.lru_cache(maxsize=8)
def rows_of(kind: str, job: ScoreJob, in_split: int) -> Rows:
    """Samples in the order of the split: the same ones for real and for generated pictures where both are as many."""
    wanted = getattr(job, COUNTS[kind])
    order = permutation(in_split, "score", job.seed)
    samples: list[int] = []
    passes: list[int] = []
    for number in range(-(-wanted // in_split)):
        chosen = np.sort(order[: wanted - number * in_split]).tolist()
        samples += chosen
        passes += [number] * len(chosen)
    return Rows(tuple(samples), tuple(passes))


def score_chunks(job: ScoreJob) -> list[ScoreChunk]:
    """All the work, in order."""
    counts = {kind: getattr(job, name) for kind, name in COUNTS.items()}
    return [
        ScoreChunk(kind, start, min(start + PIECE, count))
        for kind, count in counts.items()
        for start in range(0, count, PIECE)
    ]


def do(job: ScoreJob, piece: ScoreChunk, folder: str) -> None:
    """Make a piece's file, if it is not there."""
    where = _url(job, piece, folder)
    if storage.exists(where):
        return
    images, rows = pictures(job, piece.kind, range(piece.start, piece.end))
    tensors = {"rows": rows}
    for number in range(len(job.looks)):
        seen = looker(job, number)(images)
        tensors |= {f"{number}/features": seen.features, f"{number}/logits": seen.logits}
    storage.write_bytes(where, safetensors.torch.save(tensors))


@dataclass(frozen=True)
class Gathered:
    """All pictures of a kind. rows: (n,) which ones, without those that cannot be read. seen: by extractor."""

    rows: Tensor
    seen: tuple[Seen, ...]


def gather(job: ScoreJob, kind: str, folder: str) -> Gathered:
    """What the pieces of a kind hold."""
    parts = [
        safetensors.torch.load(storage.read_bytes(_url(job, piece, folder)))
        for piece in score_chunks(job)
        if piece.kind == kind
    ]
    seen = tuple(
        Seen(*(torch.cat([part[f"{number}/{what}"] for part in parts]) for what in ("features", "logits")))
        for number in range(len(job.looks))
    )
    return Gathered(torch.cat([part["rows"] for part in parts]), seen)


def forget(job: ScoreJob, folder: str) -> None:
    """Remove the pieces of generated pictures; those of real ones serve the next export, too."""
    storage.remove(storage.join(folder, job.key(GENERATED)))


def _url(job: ScoreJob, piece: ScoreChunk, folder: str) -> str:
    return storage.join(folder, job.key(piece.kind), piece.name)


def pictures(job: ScoreJob, kind: str, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Those of a kind at `rows`: (n, 3, pixels, pixels) uint8, and which of the rows they are (n,).

    Rows of real ones ascend. Those that cannot be read are left out, with a warning that names them.
    """
    images, kept = _generated(job, rows) if kind == GENERATED else _real(job, kind, rows)
    if job.jpeg:
        images = torch.stack([_through_jpeg(image, job.jpeg) for image in images])
    return images, kept


# ------------------------------------------------------------ in one process
_dataset_of = functools.lru_cache(maxsize=1)(open_dataset)


def _dataset(job: ScoreJob) -> Dataset:
    return _dataset_of(job.data)


@functools.lru_cache(maxsize=1)
def _loaded_of(url: str, sha256: str, own_system: str, device: str) -> Loaded:
    loaded = load(url, torch.device(device), own_system)
    if not can_draw(loaded.system):
        raise ValueError(f"{storage.redact(url)}: an export of {loaded.name}, which draws no pictures from captions")
    return loaded


def _loaded(job: ScoreJob) -> Loaded:
    return _loaded_of(job.export, job.export_sha256, job.own_system, job.device)


@functools.lru_cache(maxsize=8)
def _looker_of(look: ExtractorSpec, device: str) -> Extractor:
    if look.name == "damsm":
        return Matcher(look.weights.url, torch.device(device))
    return open_extractor(look.name, look.weights, torch.device(device))


def looker(job: ScoreJob, number: int) -> Extractor:
    """What looks at the pictures, by its place in the job."""
    return _looker_of(job.looks[number], job.device)


def drawn_size(job: ScoreJob, dataset: Dataset) -> int:
    """Pixels of the largest pictures that the export draws.

    Raises ValueError where it draws none, or draws from other words or vectors than this data has.
    """
    loaded = _loaded(job)
    if reads_vectors(loaded.system, loaded.plan.extent.vector_dim):
        if dataset.vector_dim != loaded.plan.extent.vector_dim:
            raise ValueError(
                f"{storage.redact(job.export)}: draws from sentence vectors of {loaded.plan.extent.vector_dim} "
                f"numbers, and the data's have {dataset.vector_dim}"
            )
    elif reads_text(loaded.system, loaded.plan.extent.vector_dim):
        known, there = set(loaded.vocabulary.words), set(dataset.vocabulary.words)
        if there and len(known & there) < MOST_UNKNOWN * len(there):
            raise ValueError(
                f"{storage.redact(job.export)}: knows {len(known & there)} of the {len(there)} words of this data; it "
                "was trained on other captions"
            )
    return loaded.system.sizes[-1]


def classes_of(dataset: Dataset, split: str, samples: Sequence[int]) -> Tensor:
    """(n,): those of one class are not each other's rivals."""
    return torch.from_numpy(dataset.split(split).class_ids[np.asarray(samples, dtype=np.int64)])


def caption_of(dataset: Dataset, split: str, sample: int, number: int) -> str:
    """Of a sample in the given pass: its captions in turn."""
    captions = dataset.split(split).captions(sample)
    if not captions:
        raise ValueError(f"split {split}: sample {dataset.split(split).keys[sample]} has no caption to draw")
    return captions[number % len(captions)]


def _part(job: ScoreJob, kind: str, rows: Sequence[int]) -> list[tuple[int, int]]:
    """Sample and pass of each row."""
    found = rows_of(kind, job, len(_dataset(job).split(job.split_of(kind))))
    return [(found.samples[row], found.passes[row]) for row in rows]


def _generated(job: ScoreJob, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The noise of a picture is a function of the seed, its sample and its pass."""
    loaded, dataset = _loaded(job), _dataset(job)
    in_split = len(dataset.split(job.split))
    part = _part(job, GENERATED, rows)
    if reads_text(loaded.system, loaded.plan.extent.vector_dim):
        said = [caption_of(dataset, job.split, *one) for one in part]
        captions = encode(loaded.vocabulary, said, loaded.plan.max_words)
    else:
        captions = no_captions(len(part))
    if reads_vectors(loaded.system, loaded.plan.extent.vector_dim):
        vectors = [_vectors(job, sample, number) for sample, number in part]
        captions = replace(captions, vectors=torch.stack(vectors))
    places = [number * in_split + sample for sample, number in part]
    truncation = {} if job.truncation is None else {"truncation": job.truncation}
    draw = NormalDraw(job.seed, places, torch.device(job.device), **truncation)
    drawn = generate(cast(SupportsSample, loaded.system), loaded.nets, captions, draw, device=torch.device(job.device))
    return to_uint8(drawn.images[-1]), torch.tensor(list(rows))


def _vectors(job: ScoreJob, sample: int, number: int) -> Tensor:
    dataset = _dataset(job)
    caption = number % len(dataset.split(job.split).captions(sample))
    split = load_split(dataset, job.split, sizes=(1,), max_words=1, rows=[sample], crop=1.0, caption=caption)
    return split.batch.captions.vectors[0]


def _real(job: ScoreJob, kind: str, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    dataset, split = _dataset(job), job.split_of(kind)
    samples = [sample for sample, _ in _part(job, kind, rows)]  # in the split's order, as rows are
    found = load_split(dataset, split, sizes=(job.pixels,), max_words=1, rows=samples, crop=job.data.crop).batch
    keys, read = dataset.split(split).keys, set(found.ids)
    kept = [row for row, sample in zip(rows, samples, strict=True) if keys[sample] in read]
    return found.images[-1], torch.tensor(kept, dtype=torch.int64)


def _through_jpeg(image: Tensor, quality: int) -> Tensor:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, format="JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)


class Matcher:
    """An export that places pictures and captions in one space, as an extractor."""

    classes = 0

    def __init__(self, url: str, device: torch.device) -> None:
        self._loaded, self._device = load(url, device), device
        if not can_match(self._loaded.system):
            raise ValueError(f"{storage.redact(url)}: an export of {self._loaded.name}, which matches no captions")
        self.facts: dict[str, Any] = {
            "name": self._loaded.name,
            "weights": storage.redact(url),
            "sha256": storage.sha256(storage.read_bytes(storage.join(url, export.INDEX))),
            "resize": "its own",
        }
        self.dim = int(self._loaded.meta.get("embedding_dim", 0))

    def __call__(self, images: Tensor) -> Seen:
        pictures = to_float(images).to(self._device)
        with torch.inference_mode():
            codes = cast(SupportsEmbed, self._loaded.system).embed_pictures(self._loaded.nets, pictures)
        return Seen(codes.float().cpu(), torch.zeros(len(images), 0))

    def read(self, captions: Sequence[str]) -> Tensor:
        parts = []
        for start in range(0, len(captions), PIECE):
            read = encode(self._loaded.vocabulary, captions[start : start + PIECE], self._loaded.plan.max_words)
            with torch.inference_mode():
                codes = cast(SupportsEmbed, self._loaded.system).embed_captions(
                    self._loaded.nets, read.to(self._device)
                )
            parts.append(codes.float().cpu())
        return torch.cat(parts)


Reads = Clip | Matcher
