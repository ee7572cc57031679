"""Check a shard set, byte by byte and picture by picture: python tools/check_shards.py URL [--sheet sheet.png]

Prints a page about it. Exit status: 0 where all is right, 1 where anything is not, 2 where it could not be checked.
"""

from __future__ import annotations

import argparse
import sys

from t2idist import storage
from t2idist.data.shard_writer import cores
from t2idist.data.shards import DESCRIPTION, Dataset
from t2idist.ingest import cli
from t2idist.ingest.check import Problems, check_set
from t2idist.ingest.contact_sheet import choose, draw_sheet
from t2idist.ingest.duplicates import find_duplicates
from t2idist.ingest.writer import Progress

PAIRS_SHOWN = 20


def check(arguments: argparse.Namespace) -> int:
    cli.set_endpoint(arguments.endpoint_url)
    try:
        dataset = Dataset.open(arguments.url)
    except ValueError as error:
        print(f"problems: 1\n  {error}")
        return 1
    description = storage.read_json(storage.join(arguments.url, DESCRIPTION))
    chosen = choose(dataset) if arguments.sheet else []
    with cli.Meter(sys.stderr) as meter:
        found = check_set(
            dataset, description, processes=arguments.processes, fingerprints=arguments.duplicates, pictured=chosen,
            report=lambda done, total: meter.show(Progress(done, total, 0)),
        )  # fmt: skip
    print(cli.summary(arguments.url, description))
    if arguments.duplicates:
        show_duplicates(find_duplicates(found.fingerprints), found.split_of)
    if arguments.sheet:
        storage.write_bytes(arguments.sheet, draw_sheet(dataset, found.thumbnails))
        print(f"contact sheet: {arguments.sheet}")
    show(found.problems)
    return 1 if found.problems.count else 0


def show(problems: Problems) -> None:
    print(f"problems: {problems.count or 'none'}")
    for sentence in problems.sentences:
        print(f"  {sentence}")
    if problems.count > len(problems.sentences):
        print(f"  ... and {problems.count - len(problems.sentences)} more")


def show_duplicates(groups: list[list[str]], split_of: dict[str, str]) -> None:
    """Pictures that look the same; groups that lie in two splits by name, for they leak what is tested on."""
    extra = sum(len(group) - 1 for group in groups)
    across = [group for group in groups if len({split_of[key] for key in group}) > 1]
    print(
        f"duplicates: {extra} pictures look like another one ({len(groups)} groups); {len(across)} groups across splits"
    )
    for group in across[:PAIRS_SHOWN]:
        print(f"  {', '.join(f'{split_of[key]}/{key}' for key in group[:6])}{' ...' if len(group) > 6 else ''}")
    if len(across) > PAIRS_SHOWN:
        print(f"  ... and {len(across) - PAIRS_SHOWN} more")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", metavar="URL", help="of the shard set")
    parser.add_argument("--duplicates", action="store_true", help="look for pictures that look the same")
    parser.add_argument("--sheet", metavar="FILE.png", help="draw pictures with their captions into this file")
    parser.add_argument("--processes", type=int, default=cores(), help="default: one a core (%(default)s)")
    parser.add_argument("--endpoint-url", help="of the S3 service (default: AWS_ENDPOINT_URL)")
    arguments = parser.parse_args(words)
    return cli.guarded(parser.prog, lambda: check(arguments))


if __name__ == "__main__":
    sys.exit(main())
