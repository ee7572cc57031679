"""Draws and translates for requests: an export behind a queue."""

from __future__ import annotations

import asyncio
import base64
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from t2idist import storage
from t2idist.contract import Captions, Sample, SupportsDomains, SupportsTranslate
from t2idist.data.image_file import UnusableImage, open_image
from t2idist.data.pillow import Image
from t2idist.data.single_image import image_of_file
from t2idist.data.tokenizer import known_words
from t2idist.nn.fast.layers import use_fast_layers
from t2idist.nn.fast.memory import keep_freed_memory
from t2idist.sampling.attribute_edits import AttributeEditor
from t2idist.sampling.axes import SheetRow, interpolated_columns, interpolated_rows, noise_columns
from t2idist.sampling.draw import check_draws, draw_row
from t2idist.sampling.drawings import export_sha256, png_with_settings, sample_settings
from t2idist.sampling.figures import png_bytes, to_pil
from t2idist.sampling.generate import empty_captions
from t2idist.sampling.loading import LoadedExport, load_export, open_device
from t2idist.sampling.sentence_reader import ReadSentences, SentenceReader, reads_sentences
from t2idist.sampling.sentences import MAX_CHARACTERS
from t2idist.sampling.translate import change_of
from t2idist.serve.packing import Layout, Packing, Row, draw_rows, find_layout
from t2idist.serve.queue import DrawQueue
from t2idist.serve.requests import DrawRequest, DrawResponse, Kind, Limits, Map, ModelCard, Picture, TranslateResponse

T = TypeVar("T")

ENCODERS = 2
"""Threads that write PNG files while the next batch is drawn."""
STUCK_SECONDS = 120.0
"""A batch that takes longer does not end any more."""


@dataclass(frozen=True)
class ServeConfig:
    """What is served, and what one request may ask for."""

    export: str
    device: str = "cpu"
    encoder: str | None = None
    system: str = ""
    """Module of a custom system."""
    max_images: int = 64
    """Images in one request."""
    queue: int = 256
    """Images that may wait."""
    upload_bytes: int = 16 << 20
    upload_pixels: int = 32 << 20


class Drawer:
    """Draws and translates with one export; its methods belong to one event loop.

    Raises ValueError if the export cannot be served.
    """

    def __init__(self, config: ServeConfig) -> None:
        keep_freed_memory()
        self.config = config
        self._device = open_device(config.device)
        self._loaded = _load(config, self._device)
        self._translates = _translates(self._loaded)
        for net in self._loaded.nets.values():
            use_fast_layers(net)
        self._hash = export_sha256(config.export)
        self._reader: SentenceReader | None = None
        if not self._translates and reads_sentences(self._loaded):
            self._reader = SentenceReader(self._loaded, self._device, config.encoder, option="--encoder")
        elif config.encoder is not None:
            raise ValueError(f"--encoder: {storage.redact(config.export)} reads no sentences; remove it")
        self._encoders = ThreadPoolExecutor(ENCODERS, "png")
        self.layout = self._find_layout()
        self.queue = DrawQueue(self._draw_batch, self.layout.size, self.layout.packing, config.queue)
        self.card = self._describe()

    @property
    def vocabulary(self) -> list[str]:
        """The words that the model knows, without the end token; empty if it reads any word."""
        has_words = self._reader is not None and self._reader.encoder is None
        return list(self._loaded.vocabulary.words[1:]) if has_words else []

    async def draw(self, request: DrawRequest) -> Drawing:
        """Draw images. Raises ValueError for a request that cannot be drawn, and FullQueue."""
        if self._translates:
            raise ValueError("this export translates images and generates none from sentences; use /translate")
        request.check(self.config.max_images)
        read = await self._read(request)
        if request.to is None and not request.interpolate_noise:
            captions = read.captions
            rows = [Row(captions, request.seed, i, request.truncation_or_none) for i in range(request.n)]
            sample = await self.queue.draw(rows)
            labels = [request.text or "without text"] * request.n
        else:
            labels, sample = await self._draw_between(request, read.captions)
        return await self._in_encoder(functools.partial(self._encode, request, read, labels, sample))

    async def translate(
        self, upload: bytes, chosen: Sequence[str], cleared: Sequence[str], domain: int, to: str | None, outlines: bool
    ) -> TranslateResponse:
        """Translate an image file. Raises ValueError for one that cannot be translated, and FullQueue."""
        change = change_of(self._loaded, chosen, cleared, domain, to)
        if outlines and not isinstance(self._loaded.system, SupportsDomains):
            raise ValueError("outlines is for exports of cyclegan and pix2pix")

        def run() -> tuple[Tensor, Tensor]:
            image = read_upload(upload, self.card.sizes[-1], self.config.upload_pixels, outlines)
            return image, change.apply(self._loaded, image, self._device)

        given, made = await self.queue.call(run)
        pngs = await self._in_encoder(lambda: [_base64(png_bytes(to_pil(image))) for image in (given, made)])
        return TranslateResponse(title=change.title, given=pngs[0], png=pngs[1])

    def problem(self) -> str | None:
        """Say why this server cannot draw any more; None if it can."""
        if self.queue.failure is not None:
            return f"drawing failed: {type(self.queue.failure).__name__}"
        if (seconds := self.queue.busy_seconds()) > STUCK_SECONDS:
            return f"a batch has been drawn for {seconds:.0f} seconds"
        return None

    def close(self) -> None:
        self.queue.close()
        self._encoders.shutdown(wait=False, cancel_futures=True)

    def _find_layout(self) -> Layout:
        if self._translates:  # rounding depends on the size of a batch: an image is translated alone
            return Layout(1, Packing.ALONE, (self._loaded.system.sizes[-1],), attention=False)
        return find_layout(self._loaded, self._device)

    def _draw_batch(self, rows: Sequence[Row]) -> Sample:
        return draw_rows(self._loaded, rows, self._device)

    async def _read(self, request: DrawRequest) -> ReadSentences:
        """Encode the sentences of a request."""
        reader = self._reader
        texts = [request.text] if request.to is None else [request.text, request.to]
        if reader is None:
            if any(text is not None for text in texts):
                raise ValueError("this export is unconditional; give no text")
            return ReadSentences(empty_captions(1).to(self._device), (0,), (), ())
        if reader.encoder is not None:  # a network, for which it must be our turn
            reads = await self.queue.call(lambda: [reader.read_text(text) for text in texts])
        else:
            reads = [reader.read_text(text) for text in texts]
        captions = [read.captions for read in reads]
        joined = Captions(
            torch.cat([each.tokens for each in captions]),
            torch.cat([each.lengths for each in captions]),
            torch.cat([each.vectors for each in captions]),
        )
        warnings = (*reader.warnings, *(warning for read in reads for warning in read.warnings))
        return ReadSentences(joined, (0,), (), tuple(dict.fromkeys(warnings)))

    async def _draw_between(self, request: DrawRequest, captions: Captions) -> tuple[list[str], Sample]:
        """Draw an interpolation, a row at a time; returns the labels of the images too."""
        loaded, device, limit = self._loaded, self._device, request.truncation_or_none
        if request.interpolate_noise:
            columns = interpolated_columns(request.seed, request.step_count, limit, device)
            row = SheetRow(request.text or "without text", captions, loaded.nets)
            sample = await self.queue.call(lambda: draw_row(loaded, row, columns, device), request.step_count)
            return list(columns.names), sample
        assert request.text is not None and request.to is not None
        sentences, steps = (request.text, request.to), request.step_count
        rows = await self.queue.call(lambda: interpolated_rows(loaded, sentences, captions, steps))
        columns = noise_columns(request.seed, request.n, limit, device)
        drawn = await asyncio.gather(
            *(self.queue.call(functools.partial(draw_row, loaded, row, columns, device), request.n) for row in rows)
        )
        images = tuple(torch.cat(scale) for scale in zip(*(sample.images for sample in drawn), strict=True))
        return [row.label for row in rows for _ in range(request.n)], Sample(images)

    def _encode(self, request: DrawRequest, read: ReadSentences, labels: Sequence[str], sample: Sample) -> Drawing:
        between = request.to is not None
        settings = sample_settings(
            self._hash,
            seed=request.seed,
            columns=request.step_count if request.interpolate_noise else request.n,
            scale=request.scale,
            attention=request.attention,
            steps=request.steps,
            interpolate_text=[request.text or "", request.to or ""] if between else None,
            interpolate_noise=request.interpolate_noise,
            truncation=request.truncation,
            encoder=self.config.encoder,
        )
        scales = sample.images if request.scale == "all" else sample.images[-1:]
        sentences = labels if between else [request.text or "without text"] * len(labels)
        pngs = [
            [png_with_settings(to_pil(scale[i]), {**settings, "sentence": sentence}) for scale in scales]
            for i, sentence in enumerate(sentences)
        ]
        words = [] if self._reader is None or between else self._words(request.text or "")
        maps = []
        if request.attention and sample.attention:
            maps = [
                [[_map(stage[i][word]) for stage in sample.attention] for word in range(len(words))]
                for i in range(len(labels))
            ]
        sizes = [int(scale.shape[-1]) for scale in scales]
        return Drawing(list(labels), sizes, pngs, words, list(read.warnings), maps)

    def _words(self, text: str) -> list[str]:
        """Return the words of a sentence that the model reads."""
        loaded = self._loaded
        if self._reader is not None and self._reader.encoder is not None:
            return text.split()
        return known_words(loaded.vocabulary, text)[: loaded.build_info.max_words]

    async def _in_encoder(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._encoders, function)

    def _describe(self) -> ModelCard:
        system, config, loaded = self._loaded.system, self.config, self._loaded
        kind: Kind = "text" if self._reader is not None else "unconditional"
        attributes: list[list[str]] = []
        conflicts: list[dict[str, list[str]]] = []
        domains: list[str] = []
        if isinstance(system, SupportsDomains):
            kind, domains = "domains", [system.domains[target] for target in system.targets]
        elif isinstance(system, SupportsTranslate):
            kind, attributes = "attributes", [list(names) for names in system.labels]
            editors = map(AttributeEditor.from_names, system.labels, system.exclusive)
            conflicts = [
                {name: [editor.names[i] for i in editor.conflicts(name)] for name in editor.names} for editor in editors
            ]
        limits = Limits(
            images=config.max_images,
            characters=MAX_CHARACTERS,
            upload_bytes=config.upload_bytes,
            upload_pixels=config.upload_pixels,
        )
        return ModelCard(
            name=loaded.name,
            images_seen=loaded.images,
            kind=kind,
            sizes=list(self.layout.scales),
            attention=self.layout.attention,
            words=len(self.vocabulary),
            max_words=loaded.build_info.max_words,
            attributes=attributes,
            conflicts=conflicts,
            domains=domains,
            limits=limits,
        )


def check_export(config: ServeConfig) -> None:
    """Raise ValueError if there is no export that can be served."""
    _load(config, torch.device("cpu"))


def _load(config: ServeConfig, device: torch.device) -> LoadedExport:
    loaded = load_export(config.export, device, config.system)
    if not _translates(loaded):
        check_draws(loaded, "")
    return loaded


def _translates(loaded: LoadedExport) -> bool:
    return isinstance(loaded.system, SupportsTranslate | SupportsDomains)


@dataclass(frozen=True)
class Drawing:
    """Drawn images as files."""

    labels: list[str]
    sizes: list[int]
    pngs: list[list[bytes]]
    """For each image, the PNG file of each size."""
    words: list[str]
    warnings: list[str]
    attention: list[list[list[Map]]]
    """For each image and word, the map of each stage; empty if there are none."""

    def response(self) -> DrawResponse:
        """Return the drawing as JSON has it."""
        images = [
            Picture(
                label=label,
                sizes=self.sizes,
                pngs=[_base64(png) for png in self.pngs[i]],
                attention=self.attention[i] if self.attention else [],
            )
            for i, label in enumerate(self.labels)
        ]
        return DrawResponse(images=images, words=self.words, warnings=self.warnings)


def read_upload(data: bytes, size: int, max_pixels: int, outlines: bool) -> Tensor:
    """Return the central square of an uploaded image file: (3, size, size) in [-1, 1].

    Raises ValueError if it is no image, or has more than `max_pixels`: its header is read before anything is decoded.
    """
    try:
        open_image(data, max_pixels=max_pixels)
    except UnusableImage as error:
        raise ValueError(f"image: does not decode: {error.detail}") from None
    return image_of_file(data, size, "image", as_outlines=outlines)


def _map(weights: Tensor) -> Map:
    """Encode an attention map (H, W) as a grey image, relative to its peak."""
    peak = float(weights.max())
    grey = (weights / peak if peak > 0 else weights).mul(255).round().to(torch.uint8).numpy()
    return Map(png=_base64(png_bytes(Image.fromarray(np.ascontiguousarray(grey)))), peak=round(peak, 4))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
