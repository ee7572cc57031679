"""Convert a folder of images and captions to a shard set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from t2idist.ingest import cli
from t2idist.ingest.folder import FolderOptions, list_folder
from t2idist.ingest.listing import Listing
from t2idist.ingest.tables import Columns

DESCRIPTION = """\
Convert a folder of images and captions to a shard set. The annotations are in captions.jsonl, with lines
{"image": "a.jpg", "caption": "..."} ("captions": a list; optional: "attributes", "class", "split"); in a
table (--table); or in name.txt next to each name.jpg, with one caption per line."""


def list_images(options: argparse.Namespace, listing: Listing) -> None:
    columns = Columns(
        image=options.image_column,
        caption=options.caption_column or None,
        attributes=options.attributes_column,
        class_name=options.class_column,
        split=options.split_column,
    )
    folder_options = FolderOptions(
        options.val, options.test, options.split_by_class, needs_captions=not options.allow_no_captions
    )
    list_folder(
        options.folder, listing, folder_options, table=options.table, columns=columns, captions_url=options.captions
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.tool_parser("shard_folder", DESCRIPTION, "--folder my_images --out shards/mine --size 76")
    parser.usage = "%(prog)s --folder URL --out URL [options]"
    parser.add_argument("--folder", required=True, metavar="URL", help="the images; names are relative to it")
    parser.add_argument("--captions", metavar="URL", help="a captions.jsonl elsewhere")
    parser.add_argument("--table", metavar="URL", help="a .csv, .tsv or .parquet file instead of captions.jsonl")
    parser.add_argument("--image-column", default="image", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--caption-column", default="caption", metavar="NAME", help="default: %(default)s; '': none")
    parser.add_argument("--attributes-column", metavar="NAME", help="holds names separated by , ; or |")
    parser.add_argument("--class-column", metavar="NAME")
    parser.add_argument("--split-column", metavar="NAME")
    share = "share of the images, if the data has no splits (default: %(default)s)"
    parser.add_argument("--val", type=float, default=0.05, metavar="SHARE", help=share)
    parser.add_argument("--test", type=float, default=0.05, metavar="SHARE", help=share)
    parser.add_argument("--split-by-class", action="store_true", help="assign whole classes to splits")
    parser.add_argument("--allow-no-captions", action="store_true", help="keep images without captions")
    return cli.main(parser, "folder", list_images, arguments)


if __name__ == "__main__":
    sys.exit(main())
