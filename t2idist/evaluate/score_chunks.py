"""The work of scoring, in chunks that any process can compute in any order with the same result.

A chunk is up to `CHUNK_SIZE` images of one kind, which are generated or read and then passed to every extractor. Its
features are a file in the work folder, so an interrupted scoring resumes with the missing chunks. The division into
chunks does not depend on the number of processes.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from t2idist import storage
from t2idist.config import DataConfig
from t2idist.contract import (
    SupportsEmbed,
    SupportsSample,
    is_text_conditional,
    uses_sentence_vectors,
)
from t2idist.data.loader import load_split
from t2idist.data.order import permutation
from t2idist.data.shards import Dataset
from t2idist.data.sources import open_dataset
from t2idist.engine.checkpoint import export
from t2idist.engine.kernels import allow_tf32
from t2idist.evaluate.feature_extractors import (
    ClipExtractor,
    ExtractorOutput,
    FeatureExtractor,
    WeightsFile,
    open_extractor,
)
from t2idist.nn.images import to_float, to_uint8
from t2idist.sampling.generate import GaussianNoise, empty_captions, encode_captions, generate
from t2idist.sampling.loading import LoadedExport, load_export

CHUNK_SIZE = 128
MIN_KNOWN_WORDS = 0.5
"""Share of the data's words that an export has to know."""
GENERATED, REAL, TRAIN = "generated", "real", "train"
COUNT_FIELDS = {GENERATED: "n", REAL: "real", TRAIN: "train"}
"""By kind of images, the field of the job that holds their number."""
_HASHED_NAMES = {"extractors": "looks", "custom_system": "own_system"}
"""Names of fields in the hash of `ScoreJob.key`; they stay, so that existing work folders are found."""


@dataclass(frozen=True)
class ExtractorSpec:
    """An extractor by name, or "damsm" for an export that embeds images and captions."""

    name: str
    weights: WeightsFile = WeightsFile()


@dataclass(frozen=True)
class ScoreJob:
    """Everything that the features depend on, as plain values."""

    export: str
    export_sha256: str
    """Hash of the export's index."""
    custom_system: str
    data: DataConfig
    """Of the real images, with the crop of the training."""
    split: str
    pixels: int
    """Size of the generated images, to which the real ones are resized."""
    n: int
    """Number of generated images."""
    real: int
    """Number of real images."""
    train: int
    """Number of training images, or 0."""
    seed: int
    truncation: float | None
    jpeg: int
    """Quality at which all images are JPEG-encoded first, or 0."""
    extractors: tuple[ExtractorSpec, ...]
    device: str

    def split_of(self, kind: str) -> str:
        return "train" if kind == TRAIN else self.split

    def key(self, kind: str) -> str:
        """Hash everything that the chunks of a kind depend on; real images are shared by all exports of one size."""
        ignored = {"device", *(count for other, count in COUNT_FIELDS.items() if other != kind)}
        if kind != GENERATED:
            ignored |= {"export", "export_sha256", "custom_system", "truncation"}
        values = {_HASHED_NAMES.get(name, name): value for name, value in asdict(self).items() if name not in ignored}
        return storage.sha256(json.dumps(values, sort_keys=True).encode())[:16]


@dataclass(frozen=True)
class SampleRows:
    """The samples of a split behind each row."""

    samples: tuple[int, ...]
    """Indices in the split."""
    passes: tuple[int, ...]
    """Of generated images, the pass over the split that each one belongs to."""


@dataclass(frozen=True)
class ScoreChunk:
    """Rows `start` to `end` of a kind."""

    kind: str
    start: int
    end: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.start:07d}-{self.end:07d}.safetensors"


@functools.lru_cache(maxsize=8)
def sample_rows(kind: str, job: ScoreJob, in_split: int) -> SampleRows:
    """Choose the samples of a kind, in the order of the split; equal counts choose the same samples for all kinds."""
    count = getattr(job, COUNT_FIELDS[kind])
    order = permutation(in_split, "score", job.seed)
    samples: list[int] = []
    passes: list[int] = []
    for pass_index in range(-(-count // in_split)):
        chosen = np.sort(order[: count - pass_index * in_split]).tolist()
        samples += chosen
        passes += [pass_index] * len(chosen)
    return SampleRows(tuple(samples), tuple(passes))


def score_chunks(job: ScoreJob) -> list[ScoreChunk]:
    """Return all chunks of a job, in order."""
    counts = {kind: getattr(job, name) for kind, name in COUNT_FIELDS.items()}
    return [
        ScoreChunk(kind, start, min(start + CHUNK_SIZE, count))
        for kind, count in counts.items()
        for start in range(0, count, CHUNK_SIZE)
    ]


def compute_chunk(job: ScoreJob, chunk: ScoreChunk, folder: str) -> None:
    """Write the file of a chunk, unless it exists."""
    url = _url(job, chunk, folder)
    if storage.exists(url):
        return
    images, rows = load_images(job, chunk.kind, range(chunk.start, chunk.end))
    tensors = {"rows": rows}
    for index in range(len(job.extractors)):
        output = extractor_of(job, index)(images)
        tensors |= {f"{index}/features": output.features, f"{index}/logits": output.logits}
    storage.write_bytes(url, safetensors.torch.save(tensors))


@dataclass(frozen=True)
class GatheredFeatures:
    """Features of all images of a kind."""

    rows: Tensor
    """(n,) rows of the images; those of unreadable images are missing."""
    outputs: tuple[ExtractorOutput, ...]
    """One per extractor."""


def gather_features(job: ScoreJob, kind: str, folder: str) -> GatheredFeatures:
    """Read all chunks of a kind."""
    parts = [
        safetensors.torch.load(storage.read_bytes(_url(job, chunk, folder)))
        for chunk in score_chunks(job)
        if chunk.kind == kind
    ]
    outputs = tuple(
        ExtractorOutput(*(torch.cat([part[f"{index}/{name}"] for part in parts]) for name in ("features", "logits")))
        for index in range(len(job.extractors))
    )
    return GatheredFeatures(torch.cat([part["rows"] for part in parts]), outputs)


def remove_generated_chunks(job: ScoreJob, folder: str) -> None:
    """Remove the chunks of generated images; those of real images are used again for the next export."""
    storage.remove(storage.join(folder, job.key(GENERATED)))


def _url(job: ScoreJob, chunk: ScoreChunk, folder: str) -> str:
    return storage.join(folder, job.key(chunk.kind), chunk.name)


def load_images(job: ScoreJob, kind: str, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Generate or read images.

    Args:
        job: the job.
        kind: GENERATED, REAL or TRAIN.
        rows: rows of the kind; ascending for real images.

    Returns:
        Images (n, 3, pixels, pixels) uint8, and their rows (n,). Unreadable images are left out with a warning.
    """
    images, kept = _generate_images(job, rows) if kind == GENERATED else _read_images(job, kind, rows)
    if job.jpeg:
        images = torch.stack([_jpeg_round_trip(image, job.jpeg) for image in images])
    return images, kept


# ------------------------------------------------------------ caches of one process
_cached_dataset = functools.lru_cache(maxsize=1)(open_dataset)


def _dataset(job: ScoreJob) -> Dataset:
    return _cached_dataset(job.data)


@functools.lru_cache(maxsize=1)
def _cached_export(url: str, sha256: str, custom_system: str, device: str) -> LoadedExport:
    allow_tf32(False)
    return load_export(url, torch.device(device), custom_system)


def _load_generator(job: ScoreJob) -> tuple[LoadedExport, SupportsSample]:
    loaded = _cached_export(job.export, job.export_sha256, job.custom_system, job.device)
    if not isinstance(loaded.system, SupportsSample):
        raise ValueError(
            f"{storage.redact(job.export)}: is an export of {loaded.name}, which does not generate images from captions"
        )
    return loaded, loaded.system


@functools.lru_cache(maxsize=8)
def _cached_extractor(spec: ExtractorSpec, device: str) -> FeatureExtractor:
    allow_tf32(False)
    if spec.name == "damsm":
        return DamsmExtractor(spec.weights.url, torch.device(device))
    return open_extractor(spec.name, spec.weights, torch.device(device))


def extractor_of(job: ScoreJob, index: int) -> FeatureExtractor:
    """Open an extractor by its index in the job."""
    return _cached_extractor(job.extractors[index], job.device)


# ------------------------------------------------------------ samples and images
def generated_size(job: ScoreJob, dataset: Dataset) -> int:
    """Return the size in pixels of the largest images that the export generates.

    Raises ValueError if it generates none, or reads other words or sentence vectors than the data has.
    """
    loaded, _ = _load_generator(job)
    vector_dim = loaded.build_info.data.vector_dim
    if uses_sentence_vectors(loaded.system, vector_dim):
        if dataset.vector_dim != vector_dim:
            raise ValueError(
                f"{storage.redact(job.export)}: reads sentence vectors of {vector_dim} elements, and the data's have "
                f"{dataset.vector_dim}"
            )
    elif is_text_conditional(loaded.system, vector_dim):
        known, words = set(loaded.vocabulary.words), set(dataset.vocabulary.words_read_by(loaded.vocabulary.tokenizer))
        if words and len(known & words) < MIN_KNOWN_WORDS * len(words):
            raise ValueError(
                f"{storage.redact(job.export)}: knows {len(known & words)} of the {len(words)} words of this data; it "
                "was trained on other captions"
            )
    return loaded.system.sizes[-1]


def class_ids_of(dataset: Dataset, split: str, samples: Sequence[int]) -> Tensor:
    """Return the classes of samples, (n,); captions of one class are not candidates for each other's images."""
    return torch.from_numpy(dataset.split(split).class_ids[np.asarray(samples, dtype=np.int64)])


def caption_of(dataset: Dataset, split: str, sample: int, pass_index: int) -> str:
    """Return the caption of a sample in a pass: each pass takes the next one. Raises ValueError if it has none."""
    captions = dataset.split(split).captions(sample)
    if not captions:
        raise ValueError(f"split {split}: sample {dataset.split(split).keys[sample]} has no caption to generate from")
    return captions[pass_index % len(captions)]


def _samples_and_passes(job: ScoreJob, kind: str, rows: Sequence[int]) -> list[tuple[int, int]]:
    chosen = sample_rows(kind, job, len(_dataset(job).split(job.split_of(kind))))
    return [(chosen.samples[row], chosen.passes[row]) for row in rows]


def _generate_images(job: ScoreJob, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Generate images; the noise of one depends on the seed, its sample and its pass."""
    (loaded, system), dataset = _load_generator(job), _dataset(job)
    in_split, vector_dim = len(dataset.split(job.split)), loaded.build_info.data.vector_dim
    chosen = _samples_and_passes(job, GENERATED, rows)
    if is_text_conditional(loaded.system, vector_dim):
        sentences = [caption_of(dataset, job.split, sample, pass_index) for sample, pass_index in chosen]
        captions = encode_captions(loaded.vocabulary, sentences, loaded.build_info.max_words)
    else:
        captions = empty_captions(len(chosen))
    if uses_sentence_vectors(loaded.system, vector_dim):
        vectors = [_sentence_vector(job, sample, pass_index) for sample, pass_index in chosen]
        captions = replace(captions, vectors=torch.stack(vectors))
    positions = [pass_index * in_split + sample for sample, pass_index in chosen]
    truncation = {} if job.truncation is None else {"truncation": job.truncation}
    device = torch.device(job.device)
    noise = GaussianNoise(job.seed, positions, device, **truncation)
    generated = generate(system, loaded.nets, captions, noise, device=device)
    return to_uint8(generated.images[-1]), torch.tensor(list(rows))


def _sentence_vector(job: ScoreJob, sample: int, pass_index: int) -> Tensor:
    dataset = _dataset(job)
    caption = pass_index % len(dataset.split(job.split).captions(sample))
    split = load_split(dataset, job.split, sizes=(1,), max_words=1, rows=[sample], crop=1.0, caption=caption)
    return split.batch.captions.vectors[0]


def _read_images(job: ScoreJob, kind: str, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    dataset, split = _dataset(job), job.split_of(kind)
    samples = [sample for sample, _ in _samples_and_passes(job, kind, rows)]  # ascending, as the rows are
    batch = load_split(dataset, split, sizes=(job.pixels,), max_words=1, rows=samples, crop=job.data.crop).batch
    keys, readable = dataset.split(split).keys, set(batch.ids)
    kept = [row for row, sample in zip(rows, samples, strict=True) if keys[sample] in readable]
    return batch.images[-1], torch.tensor(kept, dtype=torch.int64)


def _jpeg_round_trip(image: Tensor, quality: int) -> Tensor:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, format="JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)


class DamsmExtractor:
    """An export that embeds images and captions in one space, as an extractor."""

    classes = 0

    def __init__(self, url: str, device: torch.device) -> None:
        self._loaded, self._device = load_export(url, device), device
        system = self._loaded.system
        if not isinstance(system, SupportsEmbed):
            raise ValueError(
                f"{storage.redact(url)}: is an export of {self._loaded.name}, which does not embed images and captions"
            )
        self._system: SupportsEmbed = system
        self.facts: dict[str, Any] = {
            "name": self._loaded.name,
            "weights": storage.redact(url),
            "sha256": storage.sha256(storage.read_bytes(storage.join(url, export.INDEX))),
            "resize": "its own",
        }
        self.dim = int(self._loaded.meta.get("embedding_dim", 0))

    def __call__(self, images: Tensor) -> ExtractorOutput:
        with torch.inference_mode():
            embeddings = self._system.embed_images(self._loaded.nets, to_float(images).to(self._device))
        return ExtractorOutput(embeddings.float().cpu(), torch.zeros(len(images), 0))

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Embed captions, (n, D)."""
        parts = []
        for start in range(0, len(captions), CHUNK_SIZE):
            batch = captions[start : start + CHUNK_SIZE]
            encoded = encode_captions(self._loaded.vocabulary, batch, self._loaded.build_info.max_words)
            with torch.inference_mode():
                parts.append(self._system.embed_captions(self._loaded.nets, encoded.to(self._device)).float().cpu())
        return torch.cat(parts)


CaptionEncoder = ClipExtractor | DamsmExtractor
"""Extractors that also embed captions."""
