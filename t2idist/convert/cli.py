"""``t2idist convert``: import published weights, export to safetensors and ONNX, or publish on the Hub."""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from t2idist import storage
from t2idist.config.arguments import command_parser
from t2idist.convert import card
from t2idist.convert.authors import captions
from t2idist.convert.authors.importing import ImportOptions, ImportResult, import_weights
from t2idist.convert.to_onnx import CONFIG, README, VOCABULARY, write_onnx, write_safetensors
from t2idist.data.tokenizer import Vocabulary
from t2idist.engine.checkpoint.export import read_index
from t2idist.observability.command import command
from t2idist.sampling.loading import load_export
from t2idist.storage import hub


@command("convert")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``t2idist convert import``, ``export`` or ``push``."""
    commands = {"import": import_main, "export": export_main, "push": push_main}
    parser = command_parser(
        "convert",
        "Convert weights from or to other formats. `t2idist convert COMMAND --help` lists the options of a command.",
        "t2idist convert export --export runs/birds/attngan/export --to birds --onnx",
    )
    parser.add_argument(
        "command", choices=commands, help="import published weights, export to safetensors and ONNX, or push to the Hub"
    )
    parser.add_argument("options", nargs=argparse.REMAINDER, help="see `t2idist convert COMMAND --help`")
    parsed = parser.parse_args(arguments)
    return commands[parsed.command](parsed.options)


@command("t2idist convert import")
def import_main(arguments: Sequence[str] | None = None) -> int:
    """Convert the published weights of a system to exports; returns the exit status."""
    parser = command_parser(
        "convert import",
        "Convert the weights that the authors of a system published to exports, for sampling, scoring and training.\n"
        "Networks are identified by the names of their tensors, and sizes by the shapes; file names do not matter.\n"
        "Writes an export of the system under --to, and one of each system that it uses (damsm, for attngan) if all\n"
        "files of that are given.",
        "t2idist convert import --system attngan --from netG_epoch_600.pth --from text_encoder200.pth \\\n"
        "      --captions captions.pickle --to exports/birds",
    )
    add = parser.add_argument
    add("--system", required=True, help="the system of the weights: attngan, stackgan_pp, ...")
    add(
        "--from",
        required=True,
        action="append",
        dest="files",
        metavar="FILE",
        help="PyTorch file of weights (.pth, .ckpt); repeatable",
    )
    add("--to", required=True, metavar="URL", help="folder or object store URL for the exports")
    add("--captions", metavar="FILE", help="the authors' captions.pickle, for the vocabulary")
    add("--vocabulary", metavar="FILE", help="alternative: a text file with one word per line, in order")
    add(
        "--attributes", action="append", default=[], metavar="A,B,C",
        help="names of the attributes; repeat for a second data set",
    )  # fmt: skip
    add("--max-words", type=int, default=18, help="words per caption (default: %(default)s, for CUB; COCO: 12)")
    options = parser.parse_args(arguments)
    _import(options)
    return 0


@command("t2idist convert export")
def export_main(arguments: Sequence[str] | None = None) -> int:
    """Convert an export to safetensors and ONNX; returns the exit status."""
    parser = command_parser(
        "convert export",
        "Convert an export for use in other programs: safetensors, settings, vocabulary, a README.md that documents\n"
        "the tensors, and with --onnx the generator as ONNX.",
        "t2idist convert export --export runs/birds/attngan/export --to birds --onnx",
    )
    parser.add_argument("--export", required=True, metavar="URL", help="folder of an export")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="output folder or object store URL")
    parser.add_argument(
        "--onnx", action="store_true", help="write and check the generator as ONNX; needs: pip install 't2idist[onnx]'"
    )
    options = parser.parse_args(arguments)
    _export(options)
    return 0


@command("t2idist convert push")
def push_main(arguments: Sequence[str] | None = None) -> int:
    """Publish an export with a model card; returns the exit status."""
    parser = command_parser(
        "convert push",
        "Publish an export on the Hugging Face Hub: its safetensors, export.json, sample images, and a README.md that\n"
        "says what it is, with data, licences, scores and the command. With a folder in place of hf://USER/NAME it\n"
        "writes what would be published there.",
        "t2idist convert push --export runs/birds/attngan/export --to hf://me/birds --licence cc-by-4.0",
    )
    add = parser.add_argument
    add("--export", required=True, metavar="URL", help="folder of an export, in the folder of its stage")
    add("--to", required=True, metavar="hf://USER/NAME", help="repository, which is created; or an empty folder")
    add("--licence", default="other", metavar="ID", help="licence of the weights, as the Hub names it (default: other)")
    add("--data-licence", metavar="TEXT", help="licence of the data (default: as the data set states it)")
    add("--dataset", action="append", default=[], metavar="USER/NAME", help="data set on the Hub; repeatable")
    add("--private", action="store_true", help="create the repository as a private one")
    add("--system", default="", metavar="MODULE", help="module of the custom system that the export names")
    options = parser.parse_args(arguments)
    _push(options)
    return 0


def _push(options: argparse.Namespace) -> None:
    to_hub = options.to.startswith("hf://")
    if to_hub:
        _, _, inside = hub.split(options.to)
        if inside:
            raise ValueError(f"--to {options.to}: give a repository: hf://USER/NAME")
    elif options.to.startswith(("http://", "https://")):
        raise ValueError(f"--to {storage.redact(options.to)}: give a repository as hf://USER/NAME, or a folder")
    elif storage.list_dir(options.to):
        raise ValueError(f"--to {storage.redact(options.to)}: is not empty; use another folder")
    for option, pattern, values in (
        ("--licence", r"[A-Za-z0-9.-]+", [options.licence]),
        ("--dataset", r"[\w.-]+/[\w.-]+", options.dataset),
    ):
        for value in values:
            if not re.fullmatch(pattern, value):
                example = "cc-by-4.0" if option == "--licence" else "USER/NAME"
                raise ValueError(f"{option} {value!r}: not a name of the Hub; give one such as {example}")
    facts = card.CardFacts(options.to, options.licence, options.data_licence, tuple(options.dataset))
    loaded = load_export(options.export, torch.device("cpu"), options.system)
    with tempfile.TemporaryDirectory(prefix="t2idist-push-") as temporary:
        written = card.write_folder(loaded, temporary if to_hub else options.to, facts)
        if to_hub:
            message = f"{loaded.name} after {loaded.images:,} images"
            print(hub.publish(Path(temporary), options.to, private=options.private, message=message))
    print(f"{storage.redact(options.to)}: {', '.join(written)}")


def _import(options: argparse.Namespace) -> None:
    if options.max_words < 1:
        raise ValueError(f"--max-words {options.max_words}: must be at least 1")
    attributes = tuple(tuple(name.strip() for name in names.split(",")) for names in options.attributes)
    import_options = ImportOptions(_vocabulary(options), attributes, options.max_words)
    for result in import_weights(options.system, options.files, options.to, import_options):
        print(_format_result(result))


def _vocabulary(options: argparse.Namespace) -> Vocabulary | None:
    if options.captions and options.vocabulary:
        raise ValueError("--captions and --vocabulary: use only one of them")
    if options.captions:
        return captions.from_pickle(options.captions)
    return captions.from_text(options.vocabulary) if options.vocabulary else None


def _format_result(result: ImportResult) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in result.settings.items())
    networks = ", ".join(f"{name} {count:,}" for name, count in result.parameters.items())
    return f"{storage.redact(result.url)}: {result.system}\n  settings: {settings}\n  parameters: {networks}"


def _export(options: argparse.Namespace) -> None:
    if storage.exists(storage.join(options.to, CONFIG)):
        raise ValueError(f"--to {storage.redact(options.to)}: already contains a {CONFIG}; use another folder")
    loaded = load_export(options.export, torch.device("cpu"))
    written = {entry["file"] for entry in read_index(options.export)["networks"].values()} | {VOCABULARY, README}
    for name in storage.list_dir(options.to):
        if name in written or (options.onnx and name.endswith(".onnx")):
            raise ValueError(f"--to {storage.redact(options.to)}: already contains {name}; use another folder")
    onnx = write_onnx(loaded, options.to) if options.onnx else None
    config = write_safetensors(loaded, options.to, onnx)
    print(f"{storage.redact(options.to)}: {loaded.name}")
    for network in config["networks"].values():
        print(f"  {network['file']}: {network['parameters']:,} parameters, {network['bytes'] / 1e6:.1f} MB")
    for file, graph in config["onnx"].items():
        inputs = ", ".join(tensor["name"] for tensor in graph["inputs"])
        print(f"  {file}: inputs {inputs}; largest difference from torch {graph['largest_difference']:.1g}")
    if onnx and "text" in config["networks"]:
        print("  the text encoder is only in safetensors: its results are inputs of the ONNX files")
