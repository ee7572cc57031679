"""COCO (2014, 2017), or anything in its layout, into a shard set: python tools/shard_coco.py --coco FOLDER --out URL"""

from __future__ import annotations

import argparse
import sys

from t2idist.ingest import cli
from t2idist.ingest.coco import find_splits, list_coco, parse_split
from t2idist.ingest.listing import Listing


def listed(arguments: argparse.Namespace, listing: Listing) -> None:
    splits = [parse_split(text) for text in arguments.split]
    if arguments.coco is not None:
        splits += find_splits(arguments.coco, arguments.splits)
    if not splits:
        raise ValueError("give --coco FOLDER, or --split NAME=IMAGES_URL,ANNOTATIONS_URL")
    list_coco(splits, listing)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--coco", metavar="FOLDER", help="holds annotations/captions_*.json and the folders of pictures"
    )
    parser.add_argument("--splits", nargs="+", default=[], help="such as train val test (default: all with captions)")
    parser.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="NAME=IMAGES_URL,ANNOTATIONS_URL",
        help="a split that lies elsewhere",
    )
    return cli.main(parser, "coco", listed, words)


if __name__ == "__main__":
    sys.exit(main())
