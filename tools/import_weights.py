"""The authors' own weights as exports of ours, to sample from, to score, to train on.

    python tools/import_weights.py --system attngan --from netG_epoch_600.pth --from text_encoder200.pth \\
        --from image_encoder200.pth --captions captions.pickle --to exports/birds

Which network a file holds is told by the names in it, and all sizes by the shapes; the files may be called anything.
Writes a folder for the system under --to, and one for what it uses (damsm, for attngan) where all its files are given.
"""

from __future__ import annotations

import argparse
import sys

from t2idist import storage
from t2idist.convert.authors import captions
from t2idist.convert.authors.importing import Imported, Options, import_weights
from t2idist.data.tokenizer import Vocabulary
from t2idist.ingest import cli


def main(words: list[str] | None = None) -> int:
    """The command; gives the exit status: 0, or 2 with one sentence on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", required=True, help="whose weights they are: attngan, stackgan_pp, ...")
    parser.add_argument(
        "--from", required=True, action="append", dest="files", metavar="FILE", help="a file of theirs; again for more"
    )
    parser.add_argument("--to", required=True, metavar="URL", help="folder or object store URL for the exports")
    parser.add_argument("--captions", metavar="FILE", help="their captions.pickle, for the vocabulary")
    parser.add_argument("--vocabulary", metavar="FILE", help="instead: the words in order, one a line")
    parser.add_argument(
        "--attributes", action="append", default=[], metavar="A,B,C", help="their names; again for a second data set"
    )
    parser.add_argument("--max-words", type=int, default=18, help="of a caption (default: %(default)s, CUB; COCO: 12)")
    arguments = parser.parse_args(words)
    return cli.guarded(parser.prog, lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    if arguments.max_words < 1:
        raise ValueError(f"--max-words {arguments.max_words}: give at least 1")
    attributes = tuple(tuple(name.strip() for name in names.split(",")) for names in arguments.attributes)
    options = Options(_vocabulary(arguments), attributes, arguments.max_words)
    for made in import_weights(arguments.system, arguments.files, arguments.to, options):
        print(_told(made))
    return 0


def _vocabulary(arguments: argparse.Namespace) -> Vocabulary | None:
    if arguments.captions and arguments.vocabulary:
        raise ValueError("--captions and --vocabulary: give one of the two")
    if arguments.captions:
        return captions.from_pickle(arguments.captions)
    return captions.from_text(arguments.vocabulary) if arguments.vocabulary else None


def _told(made: Imported) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in made.settings.items())
    nets = ", ".join(f"{name} {count:,}" for name, count in made.parameters.items())
    return f"{storage.redact(made.url)}: {made.system}\n  settings: {settings}\n  parameters: {nets}"


if __name__ == "__main__":
    sys.exit(main())
