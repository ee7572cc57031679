"""Check a shard set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from t2idist import storage
from t2idist.data.shards import DESCRIPTION, MANIFEST, Dataset
from t2idist.data.statistics import IMAGES_KEY, print_findings, problems_of
from t2idist.ingest import cli
from t2idist.ingest.check import Problems, check_set
from t2idist.ingest.contact_sheet import choose_keys, draw_sheet
from t2idist.ingest.duplicates import find_duplicates
from t2idist.observability.progress_bar import ProgressBar
from t2idist.storage.outputs import check_not_input

MAX_GROUPS = 20


def check(options: argparse.Namespace) -> int:
    cli.set_endpoint(options.endpoint_url)
    try:
        dataset = Dataset.open(options.url)
    except ValueError as error:
        print(f"problems: 1\n  {error}")
        return 1
    if options.sheet:
        shards = (shard.name for split in dataset.splits.values() for shard in split.shards)
        files = (storage.join(options.url, name) for name in (DESCRIPTION, MANIFEST, *shards))
        check_not_input(options.sheet, files, "--sheet")
    description = storage.read_json(storage.join(options.url, DESCRIPTION))
    keys = choose_keys(dataset) if options.sheet else []
    with ProgressBar() as progress:
        result = check_set(
            dataset, description, processes=options.processes, fingerprints=options.duplicates, on_sheet=keys,
            report=progress.update,
        )  # fmt: skip
    quality = {**dataset.quality, IMAGES_KEY: result.equal_images}
    print_findings("check_shards.py", problems_of(replace(dataset, quality=quality)), sys.stderr)
    print(cli.summary(options.url, description))
    if options.duplicates:
        print_duplicates(find_duplicates(result.fingerprints), result.split_of)
    if options.sheet:
        storage.write_bytes(options.sheet, draw_sheet(dataset, result.thumbnails))
        print(f"contact sheet: {options.sheet}")
    print_problems(result.problems)
    return 1 if result.problems.count else 0


def print_problems(problems: Problems) -> None:
    print(f"problems: {problems.count or 'none'}")
    for sentence in problems.sentences:
        print(f"  {sentence}")
    if problems.count > len(problems.sentences):
        print(f"  ... and {problems.count - len(problems.sentences)} more")


def print_duplicates(groups: list[list[str]], split_of: dict[str, str]) -> None:
    """Print the number of near-duplicates, and the groups across splits, which leak test data into training."""
    extra = sum(len(group) - 1 for group in groups)
    across = [group for group in groups if len({split_of[key] for key in group}) > 1]
    print(f"duplicates: {extra} near-duplicate images ({len(groups)} groups); {len(across)} groups across splits")
    for group in across[:MAX_GROUPS]:
        print(f"  {', '.join(f'{split_of[key]}/{key}' for key in group[:6])}{' ...' if len(group) > 6 else ''}")
    if len(across) > MAX_GROUPS:
        print(f"  ... and {len(across) - MAX_GROUPS} more")


def main(arguments: Sequence[str] | None = None) -> int:
    description = (
        "Check every byte and every image of a shard set, and print a summary.\n"
        "Exit status: 0 without problems, 1 with problems, 2 if the check failed."
    )
    parser = cli.tool_parser("check_shards", description, "shards/mine --duplicates --sheet sheet.png")
    parser.add_argument("url", metavar="URL", help="the shard set")
    parser.add_argument("--duplicates", action="store_true", help="find near-duplicate images")
    parser.add_argument("--sheet", metavar="FILE.png", help="draw a contact sheet of images with their captions")
    cli.add_system_options(parser)
    options = parser.parse_args(arguments)
    return cli.run_command(parser.prog, lambda: check(options))


if __name__ == "__main__":
    sys.exit(main())
