"""Pictures of sentences from an export: ``python -m t2idist.evaluate.sample --export URL --text "a red heart"``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch

from t2idist import storage
from t2idist.contract import Draws, Sample
from t2idist.evaluate.draw import encode, generate
from t2idist.evaluate.load import Loaded, load
from t2idist.evaluate.monitor import can_draw, can_translate, known_words
from t2idist.evaluate.pictures import attention_figure, grid, png_bytes, to_picture


def main(words: Sequence[str] | None = None) -> int:
    """The command; gives the exit status: 0, or 2 with one sentence on stderr."""
    arguments = _parser().parse_args(words)
    try:
        return _run(arguments)
    except ValueError as error:
        print(f"sample: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m t2idist.evaluate.sample", description="Draw pictures of sentences."
    )
    parser.add_argument("--export", required=True, metavar="URL", help="folder of an export of a system that draws")
    parser.add_argument(
        "--text", action="append", default=[], metavar="SENTENCE", help="a sentence; may be given again"
    )
    parser.add_argument("--captions", metavar="FILE", help="a text file with one sentence a line")
    parser.add_argument("--out", default="samples", metavar="DIR", help="folder or URL to write to (default: samples)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same pictures (default: 0)")
    parser.add_argument("--n", type=int, default=4, help="pictures for each sentence (default: 4)")
    parser.add_argument("--scale", choices=("all", "largest"), default="largest", help="which sizes to write")
    parser.add_argument("--attention", action="store_true", help="also write each word beside its attention map")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    captions = _captions(arguments)
    if arguments.n < 1:
        raise ValueError(f"--n {arguments.n}: give at least 1")
    device = _device(arguments.device)
    loaded = load(arguments.export, device)
    if can_translate(loaded.system):
        raise ValueError(
            f"{storage.redact(arguments.export)}: this export changes pictures and draws none from sentences; use "
            f"python -m t2idist.evaluate.translate --export {storage.redact(arguments.export)} --image FILE --set NAME"
        )
    if not can_draw(loaded.system):
        raise ValueError(
            f"{storage.redact(arguments.export)}: this export does not draw pictures; give that of a generator"
        )
    _check_words(loaded, captions)
    sample = generate(
        cast(Draws, loaded.system),
        loaded.nets,
        encode(loaded.vocabulary, captions, loaded.plan.max_words).each(arguments.n),
        places=list(range(arguments.n)) * len(captions),
        seed=arguments.seed,
        device=device,
    )
    if arguments.attention and not sample.attention:
        print("sample: this system has no attention; --attention writes nothing", file=sys.stderr)
    written = _write(arguments, loaded, captions, sample)
    print(f"{len(written)} files in {storage.redact(arguments.out)}, for a first look: {written[-1]}")
    return 0


def _captions(arguments: argparse.Namespace) -> list[str]:
    captions = list(arguments.text)
    if arguments.captions:
        try:
            text = Path(arguments.captions).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise ValueError(f"--captions {arguments.captions}: {reason}") from None
        captions += [sentence.strip() for sentence in text.splitlines() if sentence.strip()]
    if not captions:
        raise ValueError("no sentence: give --text or a --captions file with one sentence a line")
    return captions


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {name}: not available on this machine") from None
    return device


def _check_words(loaded: Loaded, captions: Sequence[str]) -> None:
    for caption in captions:
        unknown = loaded.vocabulary.unknown(caption)
        if not known_words(loaded.vocabulary, caption):
            raise ValueError(f'"{caption}": no word of this sentence is in the vocabulary of the export')
        if unknown:
            quoted = ", ".join(f"'{word}'" for word in unknown)
            plural = "words are" if len(unknown) > 1 else "word is"
            print(f'sample: "{caption}": {plural} not in the vocabulary and left out: {quoted}', file=sys.stderr)


def _write(arguments: argparse.Namespace, loaded: Loaded, captions: Sequence[str], sample: Sample) -> list[str]:
    """Every picture, the attention figures, and last the contact sheet; gives the URLs."""
    written: list[str] = []

    def write(name: str, data: bytes) -> None:
        written.append(storage.join(arguments.out, name))
        storage.write_bytes(written[-1], data)

    scales = sample.images if arguments.scale == "all" else sample.images[-1:]
    for row in range(len(captions) * arguments.n):
        caption = captions[row // arguments.n]
        stem = f"{row // arguments.n + 1:03d}_{slug(caption)}_{row % arguments.n + 1:02d}"
        for images in scales:
            suffix = f"_{int(images.shape[-1])}px" if len(scales) > 1 else ""
            write(f"{stem}{suffix}.png", png_bytes(to_picture(images[row])))
        if arguments.attention and sample.attention:
            words = known_words(loaded.vocabulary, caption)[: loaded.plan.max_words]
            figure = attention_figure(sample.images[-1][row], words, [stage[row] for stage in sample.attention])
            write(f"{stem}_attention.png", png_bytes(figure))
    write("grid.png", png_bytes(grid(scales, captions, arguments.n)))
    return written


def slug(caption: str, longest: int = 48) -> str:
    """The caption as a part of a file name: ASCII words joined by '-'; "caption" where it has none."""
    words = re.findall(r"[a-z0-9]+", caption.lower())
    while len(words) > 1 and len("-".join(words)) > longest:
        words.pop()
    return "-".join(words)[:longest] or "caption"


if __name__ == "__main__":
    sys.exit(main())
