"""Own pictures and captions into a shard set: python tools/shard_folder.py --folder FOLDER --out URL

FOLDER holds pictures and one of: captions.jsonl, a line a picture: {"image": "a.jpg", "caption": "..."} (or "captions":
a list; optional "attributes", "class", "split"); a table given by --table; a file name.txt beside every name.jpg, with
one caption a line.
"""

from __future__ import annotations

import argparse
import sys

from t2idist.ingest import cli
from t2idist.ingest.folder import FolderOptions, list_folder
from t2idist.ingest.listing import Listing
from t2idist.ingest.tables import Columns


def listed(arguments: argparse.Namespace, listing: Listing) -> None:
    columns = Columns(
        image=arguments.image_column,
        caption=arguments.caption_column or None,
        attributes=arguments.attributes_column,
        class_name=arguments.class_column,
        split=arguments.split_column,
    )
    options = FolderOptions(
        arguments.val, arguments.test, arguments.split_by_class, needs_captions=not arguments.allow_no_captions
    )
    list_folder(
        arguments.folder, listing, options, table=arguments.table, columns=columns, captions_url=arguments.captions
    )


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, metavar="URL", help="the pictures; names are relative to it")
    parser.add_argument("--captions", metavar="URL", help="a captions.jsonl elsewhere")
    parser.add_argument("--table", metavar="URL", help="a .csv, .tsv or .parquet file instead of captions.jsonl")
    parser.add_argument("--image-column", default="image", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--caption-column", default="caption", metavar="NAME", help="default: %(default)s; '': none")
    parser.add_argument("--attributes-column", metavar="NAME", help="names, separated by , ; or |")
    parser.add_argument("--class-column", metavar="NAME")
    parser.add_argument("--split-column", metavar="NAME")
    parser.add_argument("--val", type=float, default=0.05, help="share, where no split is given (default: %(default)s)")
    parser.add_argument(
        "--test", type=float, default=0.05, help="share, where no split is given (default: %(default)s)"
    )
    parser.add_argument("--split-by-class", action="store_true", help="no class is in two splits")
    parser.add_argument("--allow-no-captions", action="store_true", help="pictures without captions are right")
    return cli.main(parser, "folder", listed, words)


if __name__ == "__main__":
    sys.exit(main())
