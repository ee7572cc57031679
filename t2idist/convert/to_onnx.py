"""An export for other programs: safetensors, a page about them, and the drawing itself as ONNX."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from t2idist import storage
from t2idist.contract import Captions, SupportsSample, SupportsTranslate
from t2idist.engine.checkpoint import export
from t2idist.evaluate.monitor import can_draw, can_translate
from t2idist.sampling.loading import Loaded

CONFIG = "config.json"
OPSET = 20
LARGEST_DIFFERENCE = 1e-4
"""Of a pixel in [-1, 1], between ONNX Runtime and torch."""


# ----------------------------------------------------------------------------------------------------- safetensors
def write_plain(loaded: Loaded, to: str, onnx: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write each network as safetensors, the vocabulary, `config.json` and a README; gives what `config.json` says.

    onnx: what `write_onnx` gave.
    """
    index = export.read_index(loaded.url)
    networks = {}
    for name, net in loaded.nets.items():
        entry = index["networks"][name]
        storage.write_bytes(
            storage.join(to, entry["file"]), storage.read_bytes(storage.join(loaded.url, entry["file"]))
        )
        networks[name] = {**entry, **_about(net)}
    said = {
        "system": loaded.name,
        "config": index["config"],
        "plan": index["plan"],
        "images_seen": loaded.images,
        "networks": networks,
        "onnx": dict(onnx or {}),
        **{key: loaded.meta[key] for key in ("imported", "data", "versions") if key in loaded.meta},
    }
    storage.write_bytes(storage.join(to, "vocabulary.txt"), "\n".join(loaded.vocabulary.words).encode() + b"\n")
    storage.write_json(storage.join(to, CONFIG), said)
    storage.write_bytes(storage.join(to, "README.md"), _page(said).encode())
    return said


def _about(net: nn.Module) -> dict[str, Any]:
    tensors = {
        key: {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        for key, value in net.state_dict().items()
    }
    return {
        "class": f"{type(net).__module__}.{type(net).__qualname__}",
        "about": inspect.getdoc(type(net)) or "",
        "forward": str(inspect.signature(net.forward)).replace("'", ""),
        "parameters": sum(p.numel() for p in net.parameters()),
        "tensors": tensors,
    }


def _page(said: Mapping[str, Any]) -> str:
    lines = [
        f"# Weights of {said['system']}", "",
        "Tensors carry the names of the published networks. Pictures are (N, 3, S, S) in [-1, 1], red first. Captions "
        "are word numbers, 0 is padding: a word's number is its line in `vocabulary.txt`, the first line is 0. "
        f"`{CONFIG}` has all settings, and the shape of every tensor.", "",
    ]  # fmt: skip
    for name, network in said["networks"].items():
        lines += [
            f"## {network['file']}",
            "",
            f"{name}: {network['parameters']:,} parameters.",
            "",
            network["about"],
            "",
        ]
        lines += ["```", f'tensors = safetensors.torch.load_file("{network["file"]}")']
        lines += [f"forward{network['forward']}", "```", ""]
    for file, graph in said["onnx"].items():
        lines += [f"## {file}", "", f"ONNX, opset {graph['opset']}; N is free. {graph['about']}", ""]
        lines += ["| | name | shape | type | |", "|---|---|---|---|---|"]
        for side in ("inputs", "outputs"):
            for given in graph[side]:
                shape = ", ".join(map(str, given["shape"]))
                lines.append(f"| {side[:-1]} | {given['name']} | ({shape}) | {given['dtype']} | {given['about']} |")
        lines.append("")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- ONNX
@dataclass(frozen=True)
class Input:
    """One input of a graph. make: gives it for so many rows, another one each time."""

    name: str
    about: str
    make: Callable[[int], Tensor]


def write_onnx(loaded: Loaded, to: str) -> dict[str, Any]:
    """Write the system's drawing (or translating, a file for each data set) as ONNX, and check it by ONNX Runtime.

    Gives what each file takes and gives. The text encoder is left out: its LSTM reads captions of different lengths
    packed, which ONNX has no form for; what it gives is an input. Raises ValueError, one sentence, where the system
    draws nothing, the packages are missing, or ONNX Runtime gives other pictures.
    """
    _check_packages()
    described = {}
    for file, about, graph, inputs in _graphs(loaded):
        with torch.no_grad():
            outputs = graph(*(given.make(2) for given in inputs))
        names = [f"image_{image.shape[2]}" for image in outputs]
        data = _exported(graph, inputs, names)
        worst = _difference(data, graph, inputs)
        if not worst <= LARGEST_DIFFERENCE:
            raise ValueError(f"{file}: ONNX Runtime gives pictures that are {worst:.2g} away from torch's")
        storage.write_bytes(storage.join(to, file), data)
        pictures = [_described(n, image, "in [-1, 1]") for n, image in zip(names, outputs, strict=True)]
        described[file] = {
            "opset": OPSET,
            "about": about,
            "inputs": [_described(given.name, given.make(2), given.about) for given in inputs],
            "outputs": pictures,
            "largest_difference": worst,
        }
    return described


def _check_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--onnx: {error.name} is not installed; pip install 't2idist[onnx]'") from None


def _described(name: str, value: Tensor, about: str) -> dict[str, Any]:
    dtype = str(value.dtype).removeprefix("torch.")
    return {"name": name, "shape": ["N", *value.shape[1:]], "dtype": dtype, "about": about}


Graph = tuple[str, str, nn.Module, list[Input]]
"""File, about, the graph, its inputs."""


def _graphs(loaded: Loaded) -> Iterator[Graph]:
    if can_draw(loaded.system):
        yield _drawing(loaded)
    elif can_translate(loaded.system):
        for domain, names in enumerate(cast(SupportsTranslate, loaded.system).labels):
            yield _translating(loaded, domain, names)
    else:
        raise ValueError(f"{storage.redact(loaded.url)}: --onnx: {loaded.name} draws no pictures; leave --onnx out")


class Translating(nn.Module):
    """A system's `translate` as one function of tensors."""

    def __init__(self, loaded: Loaded, domain: int) -> None:
        super().__init__()
        self.nets = nn.ModuleDict(loaded.nets)
        self._system, self._domain = cast(SupportsTranslate, loaded.system), domain

    def forward(self, images: Tensor, attributes: Tensor) -> tuple[Tensor]:
        return (self._system.translate(dict(self.nets.items()), images, attributes, self._domain),)


def _translating(loaded: Loaded, domain: int, names: tuple[str, ...]) -> Graph:
    size = loaded.system.sizes[-1]
    inputs = [
        Input("images", "pictures in [-1, 1]", lambda rows: torch.rand(rows, 3, size, size) * 2 - 1),
        Input("attributes", "wanted, 1 or 0: " + ", ".join(names), lambda rows: torch.rand(rows, len(names)).round()),
    ]
    return f"translate_{domain}.onnx", "Pictures with other attributes.", Translating(loaded, domain), inputs


class Drawing(nn.Module):
    """A system's `sample` as one function of tensors, the text encoder's results among them.

    inputs: names in their order: noise_1, noise_2, ... and any of sentence, words, lengths, vectors. shapes: of a row
    of each of these four, for those that the system does not ask for.
    """

    def __init__(self, loaded: Loaded, inputs: list[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.nets = nn.ModuleDict({name: net for name, net in loaded.nets.items() if name != "text"})
        self._system, self._inputs, self._shapes = cast(SupportsSample, loaded.system), inputs, shapes
        self._reads = "text" in loaded.nets

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(self._inputs, given, strict=True))
        rows = given[0].shape[0]
        for name, shape in self._shapes.items():
            if name not in values:
                kind = torch.int64 if name == "lengths" else torch.float32
                values[name] = torch.ones((rows, *shape), dtype=kind)
        tokens = torch.zeros((rows, self._shapes["words"][1]), dtype=torch.int64)
        noises = iter([values[name] for name in self._inputs if name.startswith("noise_")])
        nets: dict[str, Any] = dict(self.nets.items())
        if self._reads:
            nets["text"] = lambda tokens, lengths: (values["words"], values["sentence"])
        captions = Captions(tokens, values["lengths"], values["vectors"])
        return self._system.sample(nets, captions, lambda *shape: next(noises)).images


ABOUT = {
    "sentence": "sentence vectors, as the network `text` gives them",
    "words": "word vectors, as the network `text` gives them, zeros past a caption's end",
    "lengths": "words of each caption",
    "vectors": "sentence vectors of the encoder that the data came with",
}


def _drawing(loaded: Loaded) -> Graph:
    shapes, noises = _shapes(loaded)

    def make(name: str, shape: tuple[int, ...]) -> Callable[[int], Tensor]:
        if name == "lengths":
            return lambda rows: torch.randint(1, loaded.plan.max_words + 1, (rows, *shape))
        return lambda rows: torch.randn(rows, *shape)

    inputs = [Input(f"noise_{i + 1}", "standard normal", make("noise", shape)) for i, shape in enumerate(noises)] + [
        Input(name, ABOUT[name], make(name, shape)) for name, shape in shapes.items()
    ]
    names = [given.name for given in inputs]
    used = _used(Drawing(loaded, names, shapes), inputs)
    kept = [given for given, matters in zip(inputs, used, strict=True) if matters]
    drawing = Drawing(loaded, [given.name for given in kept], shapes)
    about = "Noise and text to pictures." if len(kept) > len(noises) else "Noise to pictures."
    return "draw.onnx", about, drawing, kept


def _shapes(loaded: Loaded) -> tuple[dict[str, tuple[int, ...]], list[tuple[int, ...]]]:
    """Shapes of a row of sentence, words, lengths and vectors, and of each call for noise."""
    count, longest = 2, loaded.plan.max_words
    tokens, lengths = torch.zeros(count, longest, dtype=torch.int64), torch.full((count,), longest)
    shapes: dict[str, tuple[int, ...]] = {"sentence": (0,), "words": (0, longest)}
    noises: list[tuple[int, ...]] = []

    def draw(*shape: int) -> Tensor:
        noises.append(shape)
        return torch.randn(count, *shape)

    with torch.no_grad():
        if "text" in loaded.nets:
            words, sentence = loaded.nets["text"](tokens, lengths)
            shapes = {"sentence": tuple(sentence.shape[1:]), "words": tuple(words.shape[1:])}
        vectors = torch.randn(count, loaded.plan.extent.vector_dim)
        cast(SupportsSample, loaded.system).sample(loaded.nets, Captions(tokens, lengths, vectors), draw)
    return {**shapes, "lengths": (), "vectors": (loaded.plan.extent.vector_dim,)}, noises


def _used(graph: nn.Module, inputs: list[Input]) -> list[bool]:
    """Which inputs the pictures depend on."""
    base = [given.make(8) for given in inputs]
    used = []
    with torch.no_grad():
        plain = graph(*base)
        for i, given in enumerate(inputs):
            changed = graph(*base[:i], given.make(8), *base[i + 1 :])
            used.append(any(not torch.equal(a, b) for a, b in zip(plain, changed, strict=True)))
    return used


def _exported(graph: nn.Module, inputs: list[Input], outputs: list[str]) -> bytes:
    rows = tuple({0: torch.export.Dim("N")} for _ in inputs)
    with _quiet():
        program = torch.onnx.export(
            graph.eval(), tuple(given.make(2) for given in inputs), dynamo=True, verbose=False, opset_version=OPSET,
            input_names=[given.name for given in inputs], output_names=outputs,
            dynamic_shapes=(rows,) if isinstance(graph, Drawing) else rows,  # a Drawing takes all as one
        )  # fmt: skip
    assert program is not None
    data: bytes = program.model_proto.SerializeToString()
    return data


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's talk of packages that it does not need here."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _difference(data: bytes, graph: nn.Module, inputs: list[Input]) -> float:
    """The largest difference of a pixel between ONNX Runtime and torch, for another number of rows than exported."""
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    given = [each.make(3) for each in inputs]
    with torch.no_grad():
        ours = graph(*given)
    theirs = session.run(None, {each.name: value.numpy() for each, value in zip(inputs, given, strict=True)})
    return max(float((a - torch.from_numpy(b)).abs().max()) for a, b in zip(ours, theirs, strict=True))
