"""CelebA into a shard set: python tools/shard_celeba.py --celeba FOLDER --out URL"""

from __future__ import annotations

import argparse
import sys

from t2idist.ingest import cli
from t2idist.ingest.celeba import list_celeba
from t2idist.ingest.listing import Listing


def listed(arguments: argparse.Namespace, listing: Listing) -> None:
    list_celeba(arguments.celeba, listing, arguments.captions)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--celeba", required=True, metavar="FOLDER",
        help="holds img_align_celeba, list_attr_celeba.txt and list_eval_partition.txt",
    )  # fmt: skip
    parser.add_argument("--captions", metavar="URL", help="a captions.jsonl with captions of the faces (default: none)")
    return cli.main(parser, "celeba", listed, words)


if __name__ == "__main__":
    sys.exit(main())
