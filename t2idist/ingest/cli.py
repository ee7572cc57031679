"""What the command lines of all layouts share: options, progress, summary, exit status."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

from t2idist import storage
from t2idist.data.shard_writer import cores
from t2idist.ingest.image import PictureOptions
from t2idist.ingest.listing import Listing
from t2idist.ingest.writer import REJECTED, IngestOptions, Progress, Refused, write_set

_SECONDS_BETWEEN_LINES = 10.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the writer."""
    of_set = parser.add_argument_group("the shard set")
    of_set.add_argument("--out", required=True, metavar="URL", help="folder or object store URL for the set")
    of_set.add_argument(
        "--size", type=int, default=304, help="shorter side in pixels, 0: as it is (default: %(default)s)"
    )
    of_set.add_argument("--quality", type=int, default=95, help="of JPEG (default: %(default)s)")
    of_set.add_argument("--keep-original", action="store_true", help="store the pictures' own bytes at full size")
    of_set.add_argument("--max-words", type=int, help="cut longer captions after so many words (default: never)")
    of_set.add_argument(
        "--min-count", type=int, default=1, help="words that are rarer are unknown (default: %(default)s)"
    )
    of_set.add_argument("--shard-samples", type=int, default=1024, help="a multiple of 256 (default: %(default)s)")
    of_set.add_argument("--licence", help="a line for dataset.json (default: what the data says of itself)")
    of_set.add_argument("--strict", action="store_true", help="stop where anything is wrong with the data")
    of_set.add_argument("--restart", action="store_true", help="begin anew instead of going on")
    of_set.add_argument("--processes", type=int, default=cores(), help="default: one a core (%(default)s)")
    of_set.add_argument("--endpoint-url", help="of the S3 service (default: AWS_ENDPOINT_URL)")


def main(
    parser: argparse.ArgumentParser,
    source: str,
    list_pictures: Callable[[argparse.Namespace, Listing], None],
    words: list[str] | None = None,
) -> int:
    """The command: lists, writes, sums up. Gives the exit status: 0; 1 --strict; 2 anything else; 130 Ctrl-C.

    source: the layout's name, for dataset.json.
    """
    add_options(parser)
    arguments = parser.parse_args(words)
    return guarded(parser.prog, lambda: _write(arguments, source, list_pictures))


def guarded(name: str, work: Callable[[], int]) -> int:
    """Run a command; what goes wrong ends in one sentence on stderr."""
    try:
        return work()
    except Refused as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{name}: {error or type(error).__name__}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; the same command goes on where it was", file=sys.stderr)
        return 130


def set_endpoint(endpoint_url: str | None) -> None:
    """For this program and the processes that it starts."""
    if endpoint_url is not None:
        storage.check_endpoint(endpoint_url)
        os.environ["AWS_ENDPOINT_URL"] = endpoint_url


def _write(
    arguments: argparse.Namespace, source: str, list_pictures: Callable[[argparse.Namespace, Listing], None]
) -> int:
    if arguments.processes < 1:
        raise ValueError(f"--processes {arguments.processes}: give at least 1")
    options = IngestOptions(
        picture=PictureOptions(arguments.size, arguments.quality, arguments.keep_original),
        max_words=arguments.max_words,
        min_count=arguments.min_count,
        shard_samples=arguments.shard_samples,
    )
    set_endpoint(arguments.endpoint_url)
    with Listing() as listing, Meter(sys.stderr) as meter:
        list_pictures(arguments, listing)
        description = write_set(
            listing, arguments.out, options, source=source,
            licence=arguments.licence or listing.licence or "not said", processes=arguments.processes,
            strict=arguments.strict, restart=arguments.restart, report=meter.show,
        )  # fmt: skip
    print(summary(arguments.out, description))
    return 0


class Meter:
    """Shows progress: a bar on a terminal, else a line every ten seconds."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: tqdm[Any] | None = None
        self._first: int | None = None
        self._began: tuple[float, int] | None = None
        self._last = 0.0

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, progress: Progress) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = progress.images
            self._last = now
            if self._stream.isatty():
                self._bar = tqdm(
                    total=progress.total, initial=progress.images, unit="image", file=self._stream, dynamic_ncols=True
                )
        if self._began is None and progress.images > self._first:  # the clock runs from the first picture on
            self._began = (now, progress.images)
        if self._bar is not None:
            self._bar.update(progress.images - self._bar.n)
            self._bar.set_postfix_str(f"{progress.shards} shards", refresh=False)
        elif self._began is not None and (
            now - self._last >= _SECONDS_BETWEEN_LINES or progress.images == progress.total
        ):
            self._last = now
            print(
                _line(progress, now - self._began[0], progress.images - self._began[1]), file=self._stream, flush=True
            )


def _line(progress: Progress, seconds: float, images: int) -> str:
    rate = images / seconds if seconds > 0 else 0.0
    left = (progress.total - progress.images) / rate if rate else 0.0
    shards = f"{progress.shards} shards, " if progress.shards else ""
    time_left = f"{int(left) // 60}:{int(left) % 60:02d} left"
    return f"{progress.images} of {progress.total} images, {rate:.0f} images/s, {shards}{time_left}"


def summary(url: str, description: dict[str, Any]) -> str:
    """A shard set's splits, captions and rejects, as a page of text."""
    lines = [f"{storage.redact(url)}: {description['source']}, licence: {description['licence']}", ""]
    lines.append(f"{'split':10}{'samples':>9}{'shards':>8}{'MB':>9}{'captions':>10}{'words a caption':>28}")
    for split, facts in description["splits"].items():
        text = description.get("captions", {}).get(split, {})
        words = text.get("words_per_caption", {})
        spread = "{min} / {mean:.1f} / {median} / {p95} / {max}".format(**words) if words else "-"
        size_mb = sum(shard["bytes"] for shard in facts["shards"]) / 1e6
        lines.append(
            f"{split:10}{facts['samples']:9}{len(facts['shards']):8}{size_mb:9.1f}"
            f"{text.get('captions', 0):10}{spread:>28}"
        )
    lines.append(f"{'':46}{'(min / mean / median / 95 % / max)':>28}")
    words = list(description["vocabulary"].items())
    if words:
        lines.append(
            f"words: {len(words)}; most frequent: {', '.join(f'{word} {count}' for word, count in words[:12])}"
        )
    if description.get("attribute_counts"):
        most = sorted(description["attribute_counts"].items(), key=lambda item: (-item[1], item[0]))
        lines.append(f"attributes: {len(most)}; most frequent: {', '.join(f'{name} {n}' for name, n in most[:8])}")
    if description.get("classes"):
        lines.append(f"classes: {len(description['classes'])}")
    if description.get("captions_cut"):
        lines.append(f"captions cut: {description['captions_cut']}")
    rejected = description.get("rejected", {})
    lines.append(f"wrong with the data: {'nothing' if not rejected else f'(listed in {REJECTED})'}")
    for reason, by_effect in rejected.items():
        lines.append(f"  {reason:28}{', '.join(f'{count} {effect}' for effect, count in by_effect.items())}")
    return "\n".join(lines)
