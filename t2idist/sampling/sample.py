"""Generate images of sentences from an export: the command ``t2idist sample``.

A sheet of images has two axes. Rows are sentences (--text, --captions), one sentence with other words (--change-word),
or an interpolation between two (--interpolate-text). Columns are noise (--n), an interpolation between two
(--interpolate-noise), or the styles of given images (--style-of). All kinds of rows and columns combine.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from t2idist import storage
from t2idist.config.arguments import command_parser
from t2idist.contract import Sample, SupportsDomains
from t2idist.data.tokenizer import known_words
from t2idist.nn.fast.memory import keep_freed_memory
from t2idist.observability.command import command
from t2idist.observability.progress_bar import track
from t2idist.sampling.axes import (
    BATCH_IMAGES,
    PLACEHOLDER,
    SheetColumns,
    SheetRow,
    caption_rows,
    fill_placeholders,
    interpolated_columns,
    interpolated_rows,
    noise_columns,
    parse_words,
    style_columns,
)
from t2idist.sampling.draw import check_count, check_draws, check_truncation, draw_attention, draw_row
from t2idist.sampling.drawings import (
    PlannedImages,
    choose_folder,
    export_sha256,
    png_with_settings,
    sample_settings,
)
from t2idist.sampling.figures import grid, read_image, to_pil
from t2idist.sampling.generate import empty_captions
from t2idist.sampling.loading import LoadedExport, load_export, open_device
from t2idist.sampling.sentence_reader import SentenceReader, check_placeholder, reads_sentences
from t2idist.sampling.sentences import Sentence, join_problems, read_captions

DEFAULT_FOLDER = "samples"
GRID = "grid.png"
DEFAULT_STEPS = 8


@command("sample")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``t2idist sample``; returns the exit status: 1 if a sentence was left out, because no word of it is known."""
    options = _parser().parse_args(arguments)
    keep_freed_memory()
    return _run(options)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "sample",
        "Generate images of sentences from an export.",
        't2idist sample --export RUN/attngan/export --text "a red heart" --n 4',
    )
    add = parser.add_argument
    add("--export", required=True, metavar="URL", help="folder of an export of a system that generates images")
    add(
        "--out",
        metavar="DIR",
        help="folder or URL to write to (default: samples, or samples-2, ... if others are there)",
    )
    add("--seed", type=int, default=0, help="the same seed gives the same images (default: 0)")
    add("--scale", choices=("all", "largest"), default="largest", help="image sizes to write (default: largest)")
    add("--attention", action="store_true", help="also write the attention map of each word")
    add("--encoder", metavar="NAME", help="sentence encoder (name, folder or URL), if the export reads vectors")
    add("--system", default="", metavar="MODULE", help="module of a custom system, as the export names it")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--precision", choices=("float32", "bfloat16"), default="float32", help="bfloat16 is faster (default: float32)")
    add("--steps", type=int, help=f"steps of an interpolation, both ends included (default: {DEFAULT_STEPS})")
    add = parser.add_argument_group("rows").add_argument
    add("--text", action="append", default=[], metavar="SENTENCE", help="a sentence; may be repeated")
    add("--captions", metavar="FILE", help="text file with one sentence per line, also by URL")
    add(
        "--encoding",
        metavar="NAME",
        help="encoding of that file, such as cp1252 (default: UTF-8, UTF-16 if it is that)",
    )
    add("--change-word", metavar="WORDS", help='one row per word ("red,light blue"), which replaces {} in the sentence')
    add("--interpolate-text", nargs=2, metavar=("FROM", "TO"), help="rows from one sentence to another, in --steps")
    add = parser.add_argument_group("columns").add_argument
    add("--n", type=int, help=f"images per sentence, each with other noise (default: {BATCH_IMAGES})")
    add("--interpolate-noise", action="store_true", help="columns from the first noise to the second, in --steps")
    add("--style-of", nargs="+", metavar="IMAGE", help="a column in the style of each image (exports of 'style')")
    add(
        "--truncation", type=float, metavar="T", help="redraw noise of a magnitude above T: better images, less variety"
    )
    return parser


def _check(options: argparse.Namespace) -> None:
    """Raise ValueError for options that exclude each other or are out of range."""
    interpolates = options.interpolate_text or options.interpolate_noise
    others = [f"--{name.replace('_', '-')}" for name in ("text", "captions", "change_word") if vars(options)[name]]
    if options.interpolate_text and others:
        raise ValueError(f"--interpolate-text has its own two sentences; remove {' and '.join(others)}")
    if options.interpolate_text and options.attention:
        raise ValueError("--attention: there are no words to show between two sentences; remove it")
    if options.interpolate_noise and options.style_of:
        raise ValueError("--interpolate-noise and --style-of both define the columns; give one of them")
    if options.n is not None and (options.interpolate_noise or options.style_of):
        raise ValueError("--n: --interpolate-noise and --style-of define the columns; remove --n")
    if options.n is not None:
        check_count(options.n, "--n")
    if options.steps is not None and not interpolates:
        raise ValueError("--steps is for --interpolate-text and --interpolate-noise; give one of them or remove it")
    if options.steps is not None and options.steps < 2:
        raise ValueError(f"--steps {options.steps}: give at least 2, the two ends")
    if options.steps is not None:
        check_count(options.steps, "--steps")
    check_truncation(options.truncation, "--truncation")


def _run(options: argparse.Namespace) -> int:
    _check(options)
    device = open_device(options.device)
    given = _sentences(options)
    loaded = load_export(options.export, device, options.system)
    where, change = storage.redact(options.export), "--to" if isinstance(loaded.system, SupportsDomains) else "--set"
    check_draws(loaded, f"t2idist translate --export {where} --image FILE {change} NAME")
    rows, problems = _rows(options, loaded, given, device)
    columns = _columns(options, loaded, device)
    drawing = _Drawing.plan(options, loaded, rows, columns)
    written: list[str] = []
    scales: list[tuple[Tensor, ...]] = []
    no_attention = False
    with track(list(rows.items()), "row") as tracked:
        for number, row in tracked:
            sample = draw_row(loaded, row, columns, device, options.precision)
            no_attention = options.attention and not sample.attention
            scales.append(sample.images if options.scale == "all" else sample.images[-1:])
            written += _write_row(drawing, number, row, sample)
    if no_attention:
        print("sample: this system has no attention; --attention writes nothing", file=sys.stderr)
    labels = [row.label for row in rows.values()]
    images = [torch.cat(scale) for scale in zip(*scales, strict=True)]
    sheet = grid(images, labels, columns.count, column_names=columns.names, style_images=columns.style_images)
    written.append(storage.join(drawing.folder, GRID))
    storage.write_bytes(written[-1], png_with_settings(sheet, drawing.grid_settings(rows)))
    print(
        f"wrote {len(written)} files to {storage.redact(drawing.folder)}, all images in {storage.redact(written[-1])}"
    )
    if problems:
        print(f"sample: {len(problems)} of {len(given)} sentences could not be drawn", file=sys.stderr)
    return 1 if problems else 0


def _sentences(options: argparse.Namespace) -> list[Sentence]:
    """Return the sentences of all options, in the order of the rows."""
    if options.encoding is not None and options.captions is None:
        raise ValueError("--encoding is that of the file --captions; give it or remove --encoding")
    if options.interpolate_text:
        sentences = [Sentence(text) for text in options.interpolate_text]
    else:
        sentences = [Sentence(text) for text in options.text]
        sentences += read_captions(options.captions, options.encoding) if options.captions is not None else []
    if options.change_word is not None:
        if not sentences:
            raise ValueError(f"--change-word: also give a sentence with {PLACEHOLDER} for the word, as --text")
        words = parse_words(options.change_word)
        return [
            Sentence(text, sentence.origin)
            for sentence in sentences
            for text in fill_placeholders([sentence.text], words)
        ]
    check_placeholder(sentences, "give words for it with --change-word")
    return sentences


def _rows(
    options: argparse.Namespace, loaded: LoadedExport, sentences: Sequence[Sentence], device: torch.device
) -> tuple[dict[int, SheetRow], list[str]]:
    """Return the rows by number, which is that of the sentence, and the problems of sentences that are left out."""
    if not reads_sentences(loaded):
        if sentences:
            raise ValueError(f"{storage.redact(options.export)}: this export is unconditional; give no sentence")
        return {1: caption_rows(loaded, ["without text"], empty_captions(1))[0]}, []
    if not sentences:
        raise ValueError("no sentence: give --text or a --captions file with one sentence per line")
    reader = SentenceReader(loaded, device, options.encoder, option="--encoder")
    for warning in reader.warnings:
        print(f"sample: {warning}", file=sys.stderr)
    if reader.encoder is None and options.change_word is not None:
        _check_replacements(loaded, parse_words(options.change_word))
    read = reader.read(sentences)
    if read.problems and (not read.indices or options.interpolate_text):
        raise ValueError(join_problems(read.problems))
    for message in [*(f"{problem}; the others are drawn" for problem in read.problems), *read.warnings]:
        print(f"sample: {message}", file=sys.stderr)
    texts = [sentences[index].text for index in read.indices]
    if options.interpolate_text:
        rows = interpolated_rows(loaded, texts, read.captions, options.steps or DEFAULT_STEPS)
        return dict(enumerate(rows, start=1)), []
    rows = caption_rows(loaded, texts, read.captions)
    return {index + 1: row for index, row in zip(read.indices, rows, strict=True)}, list(read.problems)


def _columns(options: argparse.Namespace, loaded: LoadedExport, device: torch.device) -> SheetColumns:
    truncation = float("inf") if options.truncation is None else options.truncation
    if options.interpolate_noise:
        return interpolated_columns(options.seed, options.steps or DEFAULT_STEPS, truncation, device)
    if options.style_of:
        images = torch.stack([read_image(url, loaded.system.sizes[-1]) for url in options.style_of]).to(device)
        return style_columns(loaded, images, options.seed, truncation)
    return noise_columns(options.seed, BATCH_IMAGES if options.n is None else options.n, truncation, device)


def _check_replacements(loaded: LoadedExport, words: Sequence[str]) -> None:
    """Raise ValueError if a word of --change-word is unknown: its row would show nothing of it."""
    vocabulary = loaded.vocabulary
    unknown = [word for word in words if vocabulary.unknown_words(word) or not known_words(vocabulary, word)]
    if unknown:
        quoted = ", ".join(f"'{word}'" for word in unknown)
        raise ValueError(f"--change-word: not in the vocabulary of the export: {quoted}")


@dataclass(frozen=True)
class _Drawing:
    """Where and with what settings the images of a command are written."""

    options: argparse.Namespace
    loaded: LoadedExport
    folder: str
    settings: dict[str, Any]
    """What an image depends on, besides its sentence."""

    @classmethod
    def plan(
        cls,
        options: argparse.Namespace,
        loaded: LoadedExport,
        rows: Mapping[int, SheetRow],
        columns: SheetColumns,
    ) -> _Drawing:
        """Choose the folder. Raises ValueError if something in it would be lost."""
        names = ("seed", "scale", "attention", "precision", "steps", "interpolate_text", "interpolate_noise")
        settings = sample_settings(
            export_sha256(options.export),
            **{name: vars(options)[name] for name in (*names, "truncation", "encoder")},
            columns=columns.count,
            style_of_sha256=[storage.sha256(storage.read_bytes(url)) for url in options.style_of or ()],
        )
        drawing = cls(options, loaded, "", settings)
        planned = [PlannedImages(GRID, drawing.grid_settings(rows))]
        for number, row in rows.items():
            planned.append(PlannedImages(f"{_stem(number, row)}_", drawing.row_settings(row)))
        inputs = [*(options.style_of or ()), *([options.captions] if options.captions else [])]
        return replace(drawing, folder=choose_folder(options.out, DEFAULT_FOLDER, planned, inputs))

    def row_settings(self, row: SheetRow) -> dict[str, Any]:
        return {**self.settings, "sentence": row.label}

    def grid_settings(self, rows: Mapping[int, SheetRow]) -> dict[str, Any]:
        sentences = "\n".join(row.label for row in rows.values())
        return {**self.settings, "sentences_sha256": storage.sha256(sentences.encode())}


def _stem(number: int, row: SheetRow) -> str:
    return f"{number:03d}_{slug(row.label)}"


def _write_row(drawing: _Drawing, number: int, row: SheetRow, sample: Sample) -> list[str]:
    """Write every image of a row and the attention figures; returns the URLs."""
    options, loaded, settings = drawing.options, drawing.loaded, drawing.row_settings(row)
    written: list[str] = []

    def write(name: str, image: Image.Image) -> None:
        written.append(storage.join(drawing.folder, name))
        storage.write_bytes(written[-1], png_with_settings(image, settings))

    scales = sample.images if options.scale == "all" else sample.images[-1:]
    for column in range(len(scales[0])):
        stem = f"{_stem(number, row)}_{column + 1:02d}"
        for images in scales:
            suffix = f"_{int(images.shape[-1])}px" if len(scales) > 1 else ""
            write(f"{stem}{suffix}.png", to_pil(images[column]))
        if options.attention and sample.attention:
            write(f"{stem}_attention.png", draw_attention(loaded, row.label, sample, column))
    return written


def slug(caption: str, max_length: int = 48) -> str:
    """Turn a caption into a part of a file name: ASCII words joined by "-", or "caption" if it has none."""
    words = re.findall(r"[a-z0-9]+", caption.lower())
    while len(words) > 1 and len("-".join(words)) > max_length:
        words.pop()
    return "-".join(words)[:max_length] or "caption"
