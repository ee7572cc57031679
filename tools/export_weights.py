"""An export for programs that are not this one: safetensors, settings, vocabulary, and ONNX of the drawing.

    python tools/export_weights.py --export runs/birds/attngan/export --to birds --onnx

The folder has a README.md that says how to feed them. --onnx needs `pip install 't2idist[onnx]'`.
"""

from __future__ import annotations

import argparse
import sys

import torch

from t2idist import storage
from t2idist.convert.to_onnx import CONFIG, write_onnx, write_plain
from t2idist.ingest import cli
from t2idist.sampling.loading import load


def main(words: list[str] | None = None) -> int:
    """The command; gives the exit status: 0, or 2 with one sentence on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", required=True, metavar="URL", help="folder of an export")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="folder or object store URL to write to")
    parser.add_argument("--onnx", action="store_true", help="write the drawing as ONNX, too, and check it")
    arguments = parser.parse_args(words)
    return cli.guarded(parser.prog, lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    if storage.exists(storage.join(arguments.to, CONFIG)):
        raise ValueError(f"--to {storage.redact(arguments.to)}: there is a {CONFIG} already; give another folder")
    loaded = load(arguments.export, torch.device("cpu"))
    onnx = write_onnx(loaded, arguments.to) if arguments.onnx else None
    said = write_plain(loaded, arguments.to, onnx)
    print(f"{storage.redact(arguments.to)}: {loaded.name}")
    for network in said["networks"].values():
        print(f"  {network['file']}: {network['parameters']:,} parameters, {network['bytes'] / 1e6:.1f} MB")
    for file, graph in said["onnx"].items():
        asked = ", ".join(given["name"] for given in graph["inputs"])
        print(f"  {file}: takes {asked}; ONNX Runtime is at most {graph['largest_difference']:.1g} from torch")
    if onnx and "text" in said["networks"]:
        print("  the text encoder is not in the ONNX: its packed LSTM has no form there; it is in safetensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
