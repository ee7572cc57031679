"""The command ``t2idist serve``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from t2idist import storage
from t2idist.config.arguments import command_parser
from t2idist.observability.command import command

TOKEN_VARIABLE = "T2IDIST_SERVE_TOKEN"
MIN_TOKEN_CHARACTERS = 16
MAX_PORT = 65535
NEEDED = ("fastapi", "uvicorn")


@command("serve")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``t2idist serve``; returns the exit status."""
    return _run(_parser().parse_args(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "serve",
        "Serve an export: a page to draw with, and an API. Only this machine reaches it, unless --host is given.",
        "t2idist serve --local --export runs/attngan-demo/attngan/export",
    )
    add = parser.add_argument
    add("--export", required=True, metavar="URL", help="folder of an export that draws or translates images")
    add("--local", action="store_true", help="serve from this process, without Ray")
    add("--host", default="127.0.0.1", help="address to listen on; off this machine it needs a token")
    add("--port", type=int, default=8000, help="port to listen on; 0: any that is free (default: 8000)")
    add("--token-file", metavar="FILE", help=f"file with the token that clients must send (or {TOKEN_VARIABLE})")
    add("--encoder", metavar="NAME", help="sentence encoder (name, folder or URL), if the export reads vectors")
    add("--system", default="", metavar="MODULE", help="module of a custom system, as the export names it")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add = parser.add_argument_group("limits").add_argument
    add("--max-images", type=int, default=64, metavar="N", help="images in one request (default: 64)")
    add("--queue", type=int, default=256, metavar="N", help="images that may wait in a replica (default: 256)")
    add("--max-upload-mb", type=int, default=16, metavar="N", help="size of an uploaded image file (default: 16)")
    add("--max-megapixels", type=int, default=32, metavar="N", help="pixels of an uploaded image (default: 32)")
    add = parser.add_argument_group("on Ray").add_argument
    add("--replicas", type=int, default=1, metavar="N", help="processes that draw (default: 1)")
    add("--cpus-per-replica", type=float, metavar="N", help="cores of each (default: 1)")
    add("--gpus-per-replica", type=float, metavar="N", help="part of a GPU for each (default: 1 with --device cuda)")
    add("--address", default="", help="Ray cluster to join, such as auto (default: Ray is started for this server)")
    return parser


def _run(options: argparse.Namespace) -> int:
    if any(importlib.util.find_spec(name) is None for name in NEEDED):
        raise ValueError("the libraries that serve are not installed; install them with: pip install 't2idist[serve]'")
    _check(options)
    from t2idist.serve.drawer import Drawer, ServeConfig
    from t2idist.serve.gate import GateConfig, hash_of
    from t2idist.serve.local import bind

    token = _token(options)
    config = ServeConfig(
        export=storage.absolute(options.export),
        device=options.device,
        encoder=options.encoder,
        system=options.system,
        max_images=options.max_images,
        queue=options.queue,
        upload_bytes=options.max_upload_mb << 20,
        upload_pixels=options.max_megapixels << 20,
    )
    gate = GateConfig(options.host, None if token is None else hash_of(token), config.upload_bytes)
    sock = bind(options.host, options.port)
    port = sock.getsockname()[1]
    address = options.host.strip("[]")
    where = f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
    if options.local:
        from t2idist.serve.api import create_app
        from t2idist.serve.local import serve

        app = create_app(Drawer(config), gate)
        _announce(options, where)
        serve(app, sock)
        return 0
    from t2idist.serve.deployment import Replicas, serve_on_ray

    sock.close()  # Ray's proxy binds to it
    replicas = Replicas(options.replicas, options.cpus_per_replica, _gpus(options), options.address)
    serve_on_ray(config, gate, replicas, port, lambda: _announce(options, where))
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raise ValueError for options that are out of range."""
    for name in ("max_images", "queue", "max_upload_mb", "max_megapixels", "replicas"):
        if vars(options)[name] < 1:
            raise ValueError(f"--{name.replace('_', '-')} {vars(options)[name]}: give at least 1")
    if options.max_images > options.queue:
        raise ValueError(f"--max-images {options.max_images}: more than --queue {options.queue} holds")
    for name in ("cpus_per_replica", "gpus_per_replica"):
        if (value := vars(options)[name]) is not None and not 0 <= value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} {value}: give 0 or more")
    if not 0 <= options.port <= MAX_PORT:
        raise ValueError(f"--port {options.port}: give a port from 1 to {MAX_PORT}, or 0: any that is free")
    if options.cpus_per_replica is None:
        options.cpus_per_replica = 1.0
    elif options.local:
        raise ValueError("--cpus-per-replica is for Ray; remove it or --local")
    if options.local and (options.replicas > 1 or options.address or options.gpus_per_replica is not None):
        raise ValueError("--replicas, --gpus-per-replica and --address are for Ray; remove them or --local")


def _gpus(options: argparse.Namespace) -> float:
    if options.gpus_per_replica is not None:
        return float(options.gpus_per_replica)
    return 1.0 if options.device.startswith("cuda") else 0.0


def _token(options: argparse.Namespace) -> str | None:
    """Return the token that clients must send. Raises ValueError if it is needed and not given, or is short."""
    from t2idist.serve.gate import is_loopback

    source, token = f"the variable {TOKEN_VARIABLE}", os.environ.get(TOKEN_VARIABLE, "").strip()
    if options.token_file is not None:
        source = f"--token-file {options.token_file}"
        try:
            token = Path(options.token_file).read_bytes().decode("ascii", "replace").strip()
        except OSError as error:
            raise ValueError(f"{source}: {error.strerror}; give a file that holds the token") from None
        if not token:
            raise ValueError(f"{source}: is empty; write a token of {MIN_TOKEN_CHARACTERS} or more characters to it")
    if not token:
        if not is_loopback(options.host):
            raise ValueError(
                f"--host {options.host}: other machines could draw with this server; give a token, as --token-file or "
                f"in {TOKEN_VARIABLE}"
            )
        return None
    if len(token) < MIN_TOKEN_CHARACTERS or not token.isascii() or len(token.split()) != 1:
        raise ValueError(f"{source}: give at least {MIN_TOKEN_CHARACTERS} ASCII characters without blanks")
    return token


def _announce(options: argparse.Namespace, where: str) -> None:
    print(f"serving {storage.redact(options.export)} at {where} (Ctrl-C ends it)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
