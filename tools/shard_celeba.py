"""Convert CelebA to a shard set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from t2idist.ingest import cli
from t2idist.ingest.celeba import list_celeba
from t2idist.ingest.listing import Listing


def list_images(options: argparse.Namespace, listing: Listing) -> None:
    list_celeba(options.celeba, listing, options.captions, from_attributes=options.captions_from_attributes)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.tool_parser("shard_celeba", "Convert CelebA to a shard set.", "--celeba celeba --out shards/celeba")
    parser.add_argument(
        "--celeba", required=True, metavar="FOLDER",
        help="contains img_align_celeba, list_attr_celeba and list_eval_partition, .txt or .csv",
    )  # fmt: skip
    captions = parser.add_mutually_exclusive_group()
    captions.add_argument("--captions", metavar="URL", help="a captions.jsonl with captions (default: none)")
    captions.add_argument(
        "--captions-from-attributes", action="store_true", help="make captions from the attributes of each image"
    )
    return cli.main(parser, "celeba", list_images, arguments)


if __name__ == "__main__":
    sys.exit(main())
