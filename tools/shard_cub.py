"""Convert CUB-200-2011 with captions to a shard set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from t2idist.ingest import cli
from t2idist.ingest.cub import list_cub
from t2idist.ingest.listing import Listing


def list_images(options: argparse.Namespace, listing: Listing) -> None:
    list_cub(options.cub, listing, options.text, options.test_classes, crop=not options.no_crop)


def main(arguments: Sequence[str] | None = None) -> int:
    description = "Convert CUB-200-2011 with captions to a shard set."
    parser = cli.tool_parser("shard_cub", description, "--cub birds --out shards/birds")
    parser.add_argument(
        "--cub", required=True, metavar="FOLDER",
        help="contains CUB_200_2011, text, and train/ and test/filenames.pickle (or train.txt and test.txt)",
    )  # fmt: skip
    parser.add_argument("--text", metavar="URL", help="folder of the captions (default: text next to the images)")
    parser.add_argument(
        "--test-classes", metavar="FILE", help="classes of the test split, one per line (default: use the lists)"
    )
    parser.add_argument("--no-crop", action="store_true", help="do not crop to the bounding boxes")
    return cli.main(parser, "cub", list_images, arguments)


if __name__ == "__main__":
    sys.exit(main())
