"""CUB-200-2011 with captions into a shard set: python tools/shard_cub.py --cub FOLDER --out URL"""

from __future__ import annotations

import argparse
import sys

from t2idist.ingest import cli
from t2idist.ingest.cub import list_cub
from t2idist.ingest.listing import Listing


def listed(arguments: argparse.Namespace, listing: Listing) -> None:
    list_cub(arguments.cub, listing, arguments.text, arguments.test_classes, crop=not arguments.no_crop)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cub", required=True, metavar="FOLDER",
        help="holds CUB_200_2011, text, and train and test with filenames.pickle (or train.txt and test.txt)",
    )  # fmt: skip
    parser.add_argument("--text", metavar="URL", help="the folder of captions (default: text beside the pictures)")
    parser.add_argument(
        "--test-classes", metavar="FILE", help="test are these classes, one a line (default: by the lists)"
    )
    parser.add_argument("--no-crop", action="store_true", help="do not crop to the bounding boxes")
    return cli.main(parser, "cub", listed, words)


if __name__ == "__main__":
    sys.exit(main())
