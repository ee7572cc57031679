"""Convert a folder of images and captions to a shard set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from t2idist.ingest import cli, pairs
from t2idist.ingest.fields import Fields
from t2idist.ingest.folder import FolderOptions, list_folder
from t2idist.ingest.layouts import list_layout
from t2idist.ingest.listing import Listing
from t2idist.ingest.tables import Columns

DESCRIPTION = """\
Convert a folder of images and captions to a shard set. The annotations are in captions.jsonl, with lines
{"image": "a.jpg", "caption": "..."} ("captions": a list; optional: "attributes", "class", "split"); in a
table (--table); or in name.txt, name.caption or name.jpg.txt next to each name.jpg, with one caption per
line. Image folders of Hugging Face (metadata.jsonl or .csv), Parquet files with embedded images and
webdataset tars are recognised, and so is one table beside the images. Folders and files named train,
validation and test are splits, and so is what a field "split" states."""


_OF_ANNOTATIONS = (
    "captions", "caption_extension", "table", "image_column", "caption_column", "attributes_column",
    "attribute_columns", "class_column", "split_column", "split_by_class",
)  # fmt: skip
"""Options about captions and other annotations, which images of domains and pairs do not have."""


def list_images(options: argparse.Namespace, listing: Listing) -> None:
    """List the images that the options name, and print how their splits came about."""
    folder_options = FolderOptions(
        options.val, options.test, options.split_by_class, needs_captions=not options.allow_no_captions,
        split_folders=not (options.split_by_hash or options.split_by_class),
        caption_extension=options.caption_extension,
    )  # fmt: skip
    if options.side_by_side and not options.folder:
        raise ValueError("--side-by-side: needs --folder; the images of --pairs and --domain are single")
    if options.domain or options.pairs or options.side_by_side:
        for name in _OF_ANNOTATIONS:
            if (given := getattr(options, name)) not in (None, False):
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"{option} {given}: images of domains and pairs are read without annotations")
    if options.domain:
        print(*pairs.list_domains(pairs.parse_domains(options.domain), listing, folder_options), sep="\n")
    elif options.pairs:
        first, second = options.pairs
        print(pairs.list_pairs(first, second, listing, folder_options))
    elif options.side_by_side:
        print(pairs.list_side_by_side(options.folder, listing, folder_options))
    else:
        list_single_images(options, listing, folder_options)


def list_single_images(options: argparse.Namespace, listing: Listing, folder_options: FolderOptions) -> None:
    fields = Fields(
        options.image_column, options.caption_column, options.attributes_column, options.class_column,
        "" if options.split_column is None and options.split_by_hash else options.split_column,
    )  # fmt: skip
    columns = Columns(
        image=options.image_column or "image",
        caption="caption" if options.caption_column is None else options.caption_column or None,
        attributes=options.attributes_column,
        class_name=options.class_column,
        split=fields.split,
        flags=tuple(name.strip() for name in (options.attribute_columns or "").split(",") if name.strip()),
    )

    def list_plain() -> str:
        return list_folder(
            options.folder, listing, folder_options, table=options.table, columns=columns,
            captions_url=options.captions, fields=fields,
        )  # fmt: skip

    annotated = options.table is not None or options.captions is not None
    if options.attribute_columns is not None and options.table is None:
        raise ValueError(f"--attribute-columns {options.attribute_columns}: needs --table")
    if options.caption_extension is not None and annotated:
        raise ValueError(f"--caption-extension {options.caption_extension}: not together with --table or --captions")
    if annotated or options.caption_extension is not None:
        print(list_plain())
    elif pairs.has_published_domains(options.folder):
        print(pairs.list_published_domains(options.folder, listing))
    else:
        list_layout(options.folder, listing, folder_options, fields, list_plain)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.tool_parser("shard_folder", DESCRIPTION, "--folder my_images --out shards/mine --size 76")
    parser.usage = "%(prog)s (--folder URL | --domain NAME=URL ... | --pairs URL URL) --out URL [options]"
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("--folder", metavar="URL", help="the images; names are relative to it")
    images.add_argument(
        "--domain", action="append", metavar="NAME=URL", help="the images of a domain, without captions; twice or more"
    )
    images.add_argument("--pairs", nargs=2, metavar="URL", help="two folders whose images of the same name are a pair")
    parser.add_argument("--side-by-side", action="store_true", help="each image of --folder is a pair, side by side")
    parser.add_argument("--captions", metavar="URL", help="a captions.jsonl elsewhere")
    parser.add_argument(
        "--caption-extension", metavar=".EXT", help="of text files beside the images (default: .txt or .caption)"
    )
    parser.add_argument("--table", metavar="URL", help="a .csv, .tsv or .parquet file instead of captions.jsonl")
    parser.add_argument("--image-column", metavar="NAME", help="default: image, or the usual one of the layout")
    parser.add_argument("--caption-column", metavar="NAME", help="default: caption, or text; '': none")
    parser.add_argument("--attributes-column", metavar="NAME", help="holds names separated by , ; or |")
    parser.add_argument(
        "--attribute-columns", metavar="A,B", help="columns of 1 and 0 (-1, true, yes ...), one per attribute; or 'all'"
    )
    parser.add_argument("--class-column", metavar="NAME")
    parser.add_argument("--split-column", metavar="NAME", help="default: split, if there is one; '': none")
    share = "share of the images, if the data has no splits (default: %(default)s)"
    parser.add_argument("--val", type=float, default=0.05, metavar="SHARE", help=share)
    parser.add_argument("--test", type=float, default=0.05, metavar="SHARE", help=share)
    parser.add_argument("--split-by-class", action="store_true", help="assign whole classes to splits")
    parser.add_argument("--split-by-hash", action="store_true", help="use no splits that the data states")
    parser.add_argument("--allow-no-captions", action="store_true", help="keep images without captions")
    return cli.main(parser, "folder", list_images, arguments)


if __name__ == "__main__":
    sys.exit(main())
