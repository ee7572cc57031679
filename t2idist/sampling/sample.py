"""Pictures of sentences from an export: ``python -m t2idist.sampling.sample --export URL --text "a red heart"``.

A sheet has two axes. Rows: sentences (--text, --captions), one sentence with other words (--change-word), or the way
between two (--interpolate-text). Columns: draws of the noise (--n), the way between two (--interpolate-noise), or the
styles of given pictures (--style-of). Every kind of rows goes with every kind of columns.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from t2idist import storage
from t2idist.contract import Captions, Sample, SupportsSample
from t2idist.evaluate.monitor import can_draw, can_translate, known_words, reads_text
from t2idist.nn.fast.memory import keep_freed_memory
from t2idist.sampling.axes import (
    PLACEHOLDER,
    SMALLEST_TRUNCATION,
    Columns,
    Row,
    changed_words,
    columns_between,
    fill_in,
    plain_columns,
    plain_rows,
    rows_between,
    style_columns,
)
from t2idist.sampling.figures import attention_figure, grid, png_bytes, read_picture, to_picture
from t2idist.sampling.generate import encode, generate, no_captions
from t2idist.sampling.loading import Loaded, load, open_device
from t2idist.sampling.sentence_encoders import maker_of_vectors, open_encoder, read_sentences

DRAWS = 4
STEPS = 8
WORDS_AT_ONCE = 1024
"""Words, over all pictures of one batch: what attention's memory grows with."""


def main(words: Sequence[str] | None = None) -> int:
    """The command; gives the exit status: 0, or 2 with one sentence on stderr."""
    arguments = _parser().parse_args(words)
    keep_freed_memory()
    try:
        return _run(arguments)
    except ValueError as error:
        print(f"sample: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m t2idist.sampling.sample", description="Draw pictures of sentences."
    )
    parser.add_argument("--export", required=True, metavar="URL", help="folder of an export of a system that draws")
    parser.add_argument("--out", default="samples", metavar="DIR", help="folder or URL to write to (default: samples)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same pictures (default: 0)")
    parser.add_argument("--scale", choices=("all", "largest"), default="largest", help="which sizes to write")
    parser.add_argument("--attention", action="store_true", help="also write each word beside its attention map")
    parser.add_argument(
        "--encoder",
        metavar="NAME",
        help="what makes sentence vectors, for exports that were trained on the data's own: a name, folder or URL, as "
        "tools/embed_captions.py takes it",
    )
    parser.add_argument(
        "--system",
        default="",
        metavar="MODULE",
        help="for an export of a system of your own: its module, as it names it",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of products of matrices: bfloat16 takes a fraction of the time (default: float32)",
    )
    rows = parser.add_argument_group("rows")
    rows.add_argument("--text", action="append", default=[], metavar="SENTENCE", help="a sentence; may be given again")
    rows.add_argument("--captions", metavar="FILE", help="a text file with one sentence a line")
    rows.add_argument(
        "--change-word",
        metavar="WORDS",
        help='a row for each of these words ("red,light blue"), which stands where the sentence has {}',
    )
    rows.add_argument(
        "--interpolate-text", nargs=2, metavar=("FROM", "TO"), help="rows from one sentence to another, in --steps"
    )
    columns = parser.add_argument_group("columns")
    columns.add_argument("--n", type=int, help=f"draws of the noise (default: {DRAWS})")
    columns.add_argument(
        "--interpolate-noise", action="store_true", help="columns from the first draw to the second, in --steps"
    )
    columns.add_argument(
        "--style-of", nargs="+", metavar="IMAGE", help="a column in the style of each picture (exports of 'style')"
    )
    columns.add_argument(
        "--truncation", type=float, metavar="T", help="no noise of a size above T: fewer odd pictures, less variety"
    )
    parser.add_argument("--steps", type=int, help=f"steps of an interpolation, ends included (default: {STEPS})")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """Whether the options go together. Raises ValueError."""
    between = arguments.interpolate_text or arguments.interpolate_noise
    others = [f"--{name.replace('_', '-')}" for name in ("text", "captions", "change_word") if vars(arguments)[name]]
    if arguments.interpolate_text and others:
        raise ValueError(f"--interpolate-text brings its own two sentences; leave {' and '.join(others)} away")
    if arguments.interpolate_text and arguments.attention:
        raise ValueError("--attention: between two sentences there are no words to show; leave it away")
    if arguments.interpolate_noise and arguments.style_of:
        raise ValueError("--interpolate-noise and --style-of both say what the columns are; give one of them")
    if arguments.n is not None and (arguments.interpolate_noise or arguments.style_of):
        raise ValueError(
            "--n counts draws; with --interpolate-noise or --style-of the columns are others; leave it away"
        )
    if arguments.n is not None and arguments.n < 1:
        raise ValueError(f"--n {arguments.n}: give at least 1")
    if arguments.steps is not None and not between:
        raise ValueError(
            "--steps is for --interpolate-text and --interpolate-noise; give one of them, or leave it away"
        )
    if arguments.steps is not None and arguments.steps < 2:
        raise ValueError(f"--steps {arguments.steps}: give at least 2, the two ends")
    if arguments.truncation is not None and not arguments.truncation >= SMALLEST_TRUNCATION:
        raise ValueError(f"--truncation {arguments.truncation}: give at least {SMALLEST_TRUNCATION}")


def _run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    device = open_device(arguments.device)
    sentences = _sentences(arguments)
    loaded = load(arguments.export, device, arguments.system)
    if can_translate(loaded.system):
        raise ValueError(
            f"{storage.redact(arguments.export)}: this export changes pictures and draws none from sentences; use "
            f"python -m t2idist.sampling.translate --export {storage.redact(arguments.export)} --image FILE --set NAME"
        )
    if not can_draw(loaded.system):
        raise ValueError(
            f"{storage.redact(arguments.export)}: this export does not draw pictures; give that of a generator"
        )
    rows = _rows(arguments, loaded, sentences, device)
    columns = _columns(arguments, loaded, device)
    written: list[str] = []
    scales: list[tuple[Tensor, ...]] = []
    for number, row in enumerate(rows, 1):
        captions = row.caption.each(columns.count)
        batch_size = max(1, WORDS_AT_ONCE // captions.tokens.shape[1])
        system = cast(SupportsSample, loaded.system)
        sample = generate(
            system,
            row.nets,
            captions,
            columns.draw,
            device=device,
            batch_size=batch_size,
            precision=arguments.precision,
        )
        if arguments.attention and not sample.attention and number == 1:
            print("sample: this system has no attention; --attention writes nothing", file=sys.stderr)
        scales.append(sample.images if arguments.scale == "all" else sample.images[-1:])
        written += _write_row(arguments, loaded, number, row, sample)
    labels = [row.label for row in rows]
    images = [torch.cat(scale) for scale in zip(*scales, strict=True)]
    sheet = grid(images, labels, columns.count, names=columns.names, tops=columns.pictures)
    written.append(storage.join(arguments.out, "grid.png"))
    storage.write_bytes(written[-1], png_bytes(sheet))
    print(f"{len(written)} files in {storage.redact(arguments.out)}, for a first look: {written[-1]}")
    return 0


def _sentences(arguments: argparse.Namespace) -> list[str]:
    """All sentences that the options give, in the order of the rows."""
    if arguments.interpolate_text:
        sentences = list(arguments.interpolate_text)
    else:
        sentences = [*arguments.text, *_lines(arguments.captions)]
    if arguments.change_word is not None:
        if not sentences:
            raise ValueError(f"--change-word: give the sentence too, as --text, with {PLACEHOLDER} where the word goes")
        return fill_in(sentences, changed_words(arguments.change_word))
    open_place = next((sentence for sentence in sentences if PLACEHOLDER in sentence), None)
    if open_place is not None:
        raise ValueError(
            f'"{open_place}" has a place for a word, {PLACEHOLDER}; say with --change-word what goes there'
        )
    return sentences


def _lines(path: str | None) -> list[str]:
    if path is None:
        return []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ValueError(f"--captions {path}: {reason}") from None
    return [sentence.strip() for sentence in text.splitlines() if sentence.strip()]


def _rows(arguments: argparse.Namespace, loaded: Loaded, sentences: Sequence[str], device: torch.device) -> list[Row]:
    if not reads_text(loaded.system, loaded.plan.extent.vector_dim):
        if sentences:
            raise ValueError(f"{storage.redact(arguments.export)}: this export draws without text; give no sentence")
        return plain_rows(loaded, ["without text"], no_captions(1))
    if not sentences:
        raise ValueError("no sentence: give --text or a --captions file with one sentence a line")
    captions = _encoded(arguments, loaded, sentences, device).to(device)
    if arguments.interpolate_text:
        return rows_between(loaded, sentences, captions, arguments.steps or STEPS)
    return plain_rows(loaded, sentences, captions)


def _encoded(arguments: argparse.Namespace, loaded: Loaded, sentences: Sequence[str], device: torch.device) -> Captions:
    """The sentences as the export reads them."""
    if "text" not in loaded.nets:
        return _as_vectors(arguments.encoder, loaded, sentences, device)
    if arguments.encoder is not None:
        raise ValueError("--encoder: this export has a text encoder of its own; leave it away")
    if arguments.change_word is not None:
        _check_changed(loaded, changed_words(arguments.change_word))
    _check_words(loaded, sentences)
    return encode(loaded.vocabulary, sentences, loaded.plan.max_words)


def _as_vectors(name: str | None, loaded: Loaded, sentences: Sequence[str], device: torch.device) -> Captions:
    """The sentences as vectors by the encoder `name`, for an export that was trained on such vectors."""
    dim = loaded.plan.extent.vector_dim
    made_by = maker_of_vectors(loaded.meta)
    if name is None:
        by = f", made by {made_by['name']}" if made_by else ""
        raise ValueError(
            f"{storage.redact(loaded.url)}: this export reads sentence vectors of {dim} numbers{by}; give what makes "
            "them as --encoder"
        )
    encoder = open_encoder(name, device)
    if encoder.dim != dim:
        raise ValueError(f"--encoder {storage.redact(name)}: gives {encoder.dim} numbers; the export reads {dim}")
    if made_by and made_by.get("sha256") != encoder.facts["sha256"]:
        print(f"sample: --encoder is not the one that made the data's vectors ({made_by['name']})", file=sys.stderr)
    return read_sentences(encoder, sentences)


def _columns(arguments: argparse.Namespace, loaded: Loaded, device: torch.device) -> Columns:
    truncation = float("inf") if arguments.truncation is None else arguments.truncation
    if arguments.interpolate_noise:
        return columns_between(arguments.seed, arguments.steps or STEPS, truncation, device)
    if arguments.style_of:
        pictures = torch.stack([read_picture(url, loaded.system.sizes[-1]) for url in arguments.style_of]).to(device)
        return style_columns(loaded, pictures, arguments.seed, truncation)
    return plain_columns(arguments.seed, DRAWS if arguments.n is None else arguments.n, truncation, device)


def _check_words(loaded: Loaded, captions: Sequence[str]) -> None:
    for caption in captions:
        unknown = loaded.vocabulary.unknown(caption)
        if not known_words(loaded.vocabulary, caption):
            raise ValueError(f'"{caption}": no word of this sentence is in the vocabulary of the export')
        if unknown:
            quoted = ", ".join(f"'{word}'" for word in unknown)
            plural = "words are" if len(unknown) > 1 else "word is"
            print(f'sample: "{caption}": {plural} not in the vocabulary and left out: {quoted}', file=sys.stderr)


def _check_changed(loaded: Loaded, words: Sequence[str]) -> None:
    """Whether the words of --change-word are known: a row without its word would show nothing. Raises ValueError."""
    strange = [word for word in words if loaded.vocabulary.unknown(word) or not known_words(loaded.vocabulary, word)]
    if strange:
        quoted = ", ".join(f"'{word}'" for word in strange)
        raise ValueError(f"--change-word: not in the vocabulary of the export: {quoted}")


def _write_row(arguments: argparse.Namespace, loaded: Loaded, number: int, row: Row, sample: Sample) -> list[str]:
    """Every picture of a row, and the attention figures; gives the URLs."""
    written: list[str] = []

    def write(name: str, data: bytes) -> None:
        written.append(storage.join(arguments.out, name))
        storage.write_bytes(written[-1], data)

    scales = sample.images if arguments.scale == "all" else sample.images[-1:]
    for column in range(len(scales[0])):
        stem = f"{number:03d}_{slug(row.label)}_{column + 1:02d}"
        for images in scales:
            suffix = f"_{int(images.shape[-1])}px" if len(scales) > 1 else ""
            write(f"{stem}{suffix}.png", png_bytes(to_picture(images[column])))
        if arguments.attention and sample.attention:
            words = known_words(loaded.vocabulary, row.label)[: loaded.plan.max_words]
            figure = attention_figure(sample.images[-1][column], words, [stage[column] for stage in sample.attention])
            write(f"{stem}_attention.png", png_bytes(figure))
    return written


def slug(caption: str, longest: int = 48) -> str:
    """The caption as a part of a file name: ASCII words joined by '-'; "caption" where it has none."""
    words = re.findall(r"[a-z0-9]+", caption.lower())
    while len(words) > 1 and len("-".join(words)) > longest:
        words.pop()
    return "-".join(words)[:longest] or "caption"


if __name__ == "__main__":
    sys.exit(main())
