"""Shared by the command lines of all readers: options, progress, summary and exit status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from t2idist import storage
from t2idist.config.arguments import command_parser
from t2idist.data.shard_writer import available_cpus
from t2idist.data.shards import MANIFEST, Dataset
from t2idist.data.statistics import print_findings, problems_of
from t2idist.data.text_files import check_encoding
from t2idist.data.tokenizer import TOKENIZERS, UNICODE
from t2idist.ingest.files import PROGRESS, SHARD_NAME, text_encoding
from t2idist.ingest.image import MAX_MEGAPIXELS, ImageOptions
from t2idist.ingest.listing import Listing
from t2idist.ingest.rejects import Reason
from t2idist.ingest.writer import REJECTED, IngestOptions, StrictError, write_set
from t2idist.observability import command as ending
from t2idist.observability.progress_bar import ProgressBar
from t2idist.storage.outputs import is_same_file


def tool_parser(tool: str, description: str, example: str) -> argparse.ArgumentParser:
    """Build the parser of ``tools/<tool>.py``. `example`: its arguments in the example at the end of the help text."""
    parser = command_parser(tool, description, f"python tools/{tool}.py {example}")
    parser.prog = f"{tool}.py"
    return parser


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the writer."""
    group = parser.add_argument_group("shard set")
    group.add_argument("--out", required=True, metavar="URL", help="folder or object store URL for the shard set")
    group.add_argument(
        "--size",
        type=int,
        default=304,
        metavar="N",
        help="pixels of the shorter side, 0: no resizing (default: %(default)s)",
    )
    group.add_argument("--quality", type=int, default=95, metavar="N", help="JPEG quality (default: %(default)s)")
    group.add_argument(
        "--max-megapixels",
        type=int,
        default=MAX_MEGAPIXELS,
        metavar="N",
        help="leave out larger images (default: %(default)s)",
    )
    group.add_argument("--keep-original", action="store_true", help="store the original bytes at full size")
    group.add_argument(
        "--max-words", type=int, metavar="N", help="cut longer captions to this many words (default: no limit)"
    )
    group.add_argument(
        "--min-count", type=int, default=1, metavar="N", help="rarer words are unknown (default: %(default)s)"
    )
    group.add_argument(
        "--tokenizer",
        choices=tuple(TOKENIZERS),
        default=UNICODE,
        help="words of any script, or ASCII only as in the authors' code (default: %(default)s)",
    )
    group.add_argument(
        "--encoding", metavar="NAME", help="of text files, such as cp1252 (default: UTF-8, or UTF-16 if they are)"
    )
    group.add_argument(
        "--shard-samples", type=int, default=1024, metavar="N", help="a multiple of 256 (default: %(default)s)"
    )
    group.add_argument("--licence", metavar="TEXT", help="text for dataset.json (default: as the data states)")
    group.add_argument("--strict", action="store_true", help="stop if the data has any problem")
    group.add_argument("--restart", action="store_true", help="start again instead of resuming")
    add_system_options(group)


def add_system_options(parser: argparse._ActionsContainer) -> None:
    """Add --processes and --endpoint-url."""
    parser.add_argument(
        "--processes", type=int, default=available_cpus(), metavar="N", help="default: all CPUs (%(default)s)"
    )
    add_endpoint_option(parser)


def add_endpoint_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--endpoint-url", metavar="URL", help="S3 endpoint (default: AWS_ENDPOINT_URL)")


def main(
    parser: argparse.ArgumentParser,
    source: str,
    list_images: Callable[[argparse.Namespace, Listing], None],
    arguments: Sequence[str] | None = None,
) -> int:
    """Run a reader and the writer, and print a summary.

    Args:
        source: name of the layout, for dataset.json.
        list_images: adds the images to the listing.

    Returns:
        The exit status: 0; 1 for a problem with --strict; 2 for any other error; 130 after Ctrl-C.
    """
    add_options(parser)
    parsed = parser.parse_args(arguments)
    return run_command(parser.prog, lambda: _write(parser.prog, parsed, source, list_images))


def run_command(name: str, command: Callable[[], int]) -> int:
    """Run a command as `observability.command` does; its status 1 is a verdict, so that any error is 2."""

    def strict() -> int:
        try:
            return command()
        except StrictError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1

    return ending.run_command(
        name, strict, failed=ending.BAD_INPUT, interrupted=f"{name}: interrupted; run the same command again to resume"
    )


def set_endpoint(endpoint_url: str | None) -> None:
    """Set the S3 endpoint for this process and its children."""
    if endpoint_url is not None:
        storage.check_endpoint(endpoint_url)
        os.environ["AWS_ENDPOINT_URL"] = endpoint_url


def _write(
    tool: str, arguments: argparse.Namespace, source: str, list_images: Callable[[argparse.Namespace, Listing], None]
) -> int:
    if arguments.processes < 1:
        raise ValueError(f"--processes {arguments.processes}: must be at least 1")
    options = IngestOptions(
        image=ImageOptions(arguments.size, arguments.quality, arguments.keep_original, arguments.max_megapixels),
        max_words=arguments.max_words,
        min_count=arguments.min_count,
        shard_samples=arguments.shard_samples,
        tokenizer=arguments.tokenizer,
        encoding=None if arguments.encoding is None else check_encoding(arguments.encoding),
    )
    set_endpoint(arguments.endpoint_url)
    _check_inputs_stay(arguments)
    with Listing() as listing:
        try:
            with text_encoding(options.encoding):
                list_images(arguments, listing)
        finally:
            for note in listing.notes:
                print(f"{tool}: {note}", file=sys.stderr)
        options = replace(options, image=replace(options.image, pairs=listing.pairs))
        try:
            with ProgressBar() as progress:
                description = write_set(
                    listing, arguments.out, options, source=source,
                    licence=arguments.licence or listing.licence or "not said", processes=arguments.processes,
                    strict=arguments.strict, restart=arguments.restart, report=progress.update,
                )  # fmt: skip
        finally:
            _name_undecodable(tool, listing)
        print_findings(
            tool, [*listing.findings(), *problems_of(Dataset.open(arguments.out, check_sizes=False))], sys.stderr
        )
    print(summary(arguments.out, description))
    return 0


def _name_undecodable(tool: str, listing: Listing) -> None:
    """Say on stderr which byte is no text, and how it can be read."""
    undecodable = (reject for reject in listing.rejects() if reject.reason is Reason.INVALID_UTF8)
    if (first := next(undecodable, None)) is not None:
        count = 1 + sum(1 for _ in undecodable)
        print(f"{tool}: text that cannot be decoded: {count}, the first is {first}", file=sys.stderr)


def _check_inputs_stay(arguments: argparse.Namespace) -> None:
    """Raise ValueError if --out is an input folder with files of the names that are about to be written."""
    given = [value for name, value in vars(arguments).items() if isinstance(value, str) and name != "out"]
    if not any(is_same_file(value, arguments.out) for value in given):
        return
    names = storage.list_dir(arguments.out)
    if PROGRESS in names:  # an interrupted run wrote them
        return
    if taken := [name for name in names if name == MANIFEST or SHARD_NAME.fullmatch(name)]:
        raise ValueError(
            f"--out {storage.redact(arguments.out)}: is also the input, whose {taken[0]} would be overwritten; use "
            "another folder"
        )


def summary(url: str, description: dict[str, Any]) -> str:
    """Format the splits, captions and rejects of a shard set as text."""
    lines = [f"{storage.redact(url)}: {description['source']}, licence: {description['licence']}", ""]
    lines.append(f"{'split':10}{'samples':>9}{'shards':>8}{'MB':>9}{'captions':>10}{'words per caption':>28}")
    for split, info in description["splits"].items():
        text = description.get("captions", {}).get(split, {})
        words = text.get("words_per_caption", {})
        word_counts = "{min} / {mean:.1f} / {median} / {p95} / {max}".format(**words) if words else "-"
        size_mb = sum(shard["bytes"] for shard in info["shards"]) / 1e6
        lines.append(
            f"{split:10}{info['samples']:9}{len(info['shards']):8}{size_mb:9.1f}"
            f"{text.get('captions', 0):10}{word_counts:>28}"
        )
    lines.append(f"{'':46}{'(min / mean / median / 95 % / max)':>28}")
    words = list(description["vocabulary"].items())
    if words:
        lines.append(
            f"words: {len(words)}; most frequent: {', '.join(f'{word} {count}' for word, count in words[:12])}"
        )
    if description.get("attribute_counts"):
        attributes = sorted(description["attribute_counts"].items(), key=lambda item: (-item[1], item[0]))
        lines.append(
            f"attributes: {len(attributes)}; most frequent: {', '.join(f'{name} {n}' for name, n in attributes[:8])}"
        )
    if description.get("classes"):
        lines.append(f"classes: {len(description['classes'])}")
    if description.get("captions_cut"):
        lines.append(f"captions cut: {description['captions_cut']}")
    rejected = description.get("rejected", {})
    lines.append(f"problems with the data: {'none' if not rejected else f'(listed in {REJECTED})'}")
    for reason, by_effect in rejected.items():
        lines.append(f"  {reason:28}{', '.join(f'{count} {effect}' for effect, count in by_effect.items())}")
    return "\n".join(lines)
