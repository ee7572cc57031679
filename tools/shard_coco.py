"""Convert COCO (2014, 2017), or data in the same layout, to a shard set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from t2idist.ingest import cli
from t2idist.ingest.coco import find_splits, list_coco, parse_split
from t2idist.ingest.listing import Listing


def list_images(options: argparse.Namespace, listing: Listing) -> None:
    splits = [parse_split(text) for text in options.split]
    if options.coco is not None:
        splits += find_splits(options.coco, options.splits, listing.notes)
    if not splits:
        raise ValueError("no data given; use --coco FOLDER, or --split NAME=IMAGES_URL,ANNOTATIONS_URL")
    list_coco(splits, listing)


def main(arguments: Sequence[str] | None = None) -> int:
    description = "Convert COCO (2014, 2017), or data in the same layout, to a shard set."
    parser = cli.tool_parser("shard_coco", description, "--coco coco --splits train2017 val2017 --out shards/coco")
    parser.add_argument("--coco", metavar="FOLDER", help="contains annotations/captions_*.json and the image folders")
    parser.add_argument(
        "--splits",
        nargs="+",
        default=[],
        help="e.g. train2017 val2017 (default: all with captions; of several years, 2014)",
    )
    parser.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="NAME=IMAGES_URL,ANNOTATIONS_URL",
        help="a split that is stored elsewhere; repeatable",
    )
    return cli.main(parser, "coco", list_images, arguments)


if __name__ == "__main__":
    sys.exit(main())
