"""Convert an export for other programs: safetensors with a README, and the generator as ONNX."""

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
from t2idist.contract import Captions, SupportsDomains, SupportsSample, SupportsTranslate
from t2idist.data.tokenizer import ASCII, UNICODE, WORDS
from t2idist.engine.checkpoint import export
from t2idist.sampling.loading import LoadedExport

CONFIG = "config.json"
README = "README.md"
VOCABULARY = "vocabulary.txt"
OPSET = 20
_SPLITTING = {
    ASCII: "lower case, then runs of letters, digits and underscores, without characters that are not ASCII",
    UNICODE: f"runs of letters, digits and underscores with their marks ({WORDS})",
}
MAX_DIFFERENCE = 1e-4
"""Largest accepted difference between ONNX Runtime and torch, of a pixel in [-1, 1]."""


# ----------------------------------------------------------------------------------------------------- safetensors
def write_safetensors(loaded: LoadedExport, to: str, onnx: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write each network as safetensors, the vocabulary, `config.json` and a README.

    Args:
        onnx: result of `write_onnx`.

    Returns:
        The content of `config.json`.
    """
    index = export.read_index(loaded.url)
    networks = {}
    for name, net in loaded.nets.items():
        entry = index["networks"][name]
        storage.write_bytes(
            storage.join(to, entry["file"]), storage.read_bytes(storage.join(loaded.url, entry["file"]))
        )
        networks[name] = {**entry, **_describe_network(net)}
    config = {
        "system": loaded.name,
        "config": index["config"],
        "plan": index["plan"],
        "images_seen": loaded.images,
        "tokenizer": loaded.vocabulary.tokenizer,
        "networks": networks,
        "onnx": dict(onnx or {}),
        **{key: loaded.meta[key] for key in ("imported", "data", "versions") if key in loaded.meta},
    }
    storage.write_bytes(storage.join(to, VOCABULARY), "\n".join(loaded.vocabulary.words).encode() + b"\n")
    storage.write_json(storage.join(to, CONFIG), config)
    storage.write_bytes(storage.join(to, README), _readme(config).encode())
    return config


def _describe_network(net: nn.Module) -> dict[str, Any]:
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


def _readme(config: Mapping[str, Any]) -> str:
    lines = [
        f"# Weights of {config['system']}", "",
        "Tensors have the names of the published networks. Images are (N, 3, S, S) in [-1, 1], RGB. Captions are word "
        "ids, padded with 0: the id of a word is its line in `vocabulary.txt`, counted from 0. "
        f"Captions are split into words by {_SPLITTING[config['tokenizer']]}. "
        f"`{CONFIG}` contains all settings, and the shape of every tensor.", "",
    ]  # fmt: skip
    for name, network in config["networks"].items():
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
    for file, graph in config["onnx"].items():
        lines += [f"## {file}", "", f"ONNX, opset {graph['opset']}; any N. {graph['about']}", ""]
        lines += ["| | name | shape | type | |", "|---|---|---|---|---|"]
        for side in ("inputs", "outputs"):
            for tensor in graph[side]:
                shape = ", ".join(map(str, tensor["shape"]))
                lines.append(f"| {side[:-1]} | {tensor['name']} | ({shape}) | {tensor['dtype']} | {tensor['about']} |")
        lines.append("")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- ONNX
@dataclass(frozen=True)
class GraphInput:
    """One input of a graph."""

    name: str
    about: str
    make: Callable[[int], Tensor]
    """Returns random values for N rows."""


def write_onnx(loaded: LoadedExport, to: str) -> dict[str, Any]:
    """Write a system's `sample` (or `translate`, one file per data set) as ONNX, and check it with ONNX Runtime.

    The text encoder is left out: its results are inputs of the graph.

    Returns:
        A description of the inputs and outputs of each file.

    Raises:
        ValueError: the system generates no images, a package is missing, or ONNX Runtime gives other images.
    """
    _check_packages()
    described = {}
    for file, about, graph, inputs in _graphs(loaded):
        with torch.no_grad():
            outputs = graph(*(tensor.make(2) for tensor in inputs))
        names = [f"image_{image.shape[2]}" for image in outputs]
        data = _to_onnx(graph, inputs, names)
        difference = _max_difference(data, graph, inputs)
        if not difference <= MAX_DIFFERENCE:
            raise ValueError(f"{file}: ONNX Runtime and torch give images that differ by {difference:.2g}")
        storage.write_bytes(storage.join(to, file), data)
        described[file] = {
            "opset": OPSET,
            "about": about,
            "inputs": [_describe_tensor(tensor.name, tensor.make(2), tensor.about) for tensor in inputs],
            "outputs": [_describe_tensor(n, image, "in [-1, 1]") for n, image in zip(names, outputs, strict=True)],
            "largest_difference": difference,
        }
    return described


def _check_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--onnx: {error.name} is not installed; pip install 't2idist[onnx]'") from None


def _describe_tensor(name: str, value: Tensor, about: str) -> dict[str, Any]:
    dtype = str(value.dtype).removeprefix("torch.")
    return {"name": name, "shape": ["N", *value.shape[1:]], "dtype": dtype, "about": about}


Graph = tuple[str, str, nn.Module, list[GraphInput]]
"""File name, description, graph and inputs."""


def _graphs(loaded: LoadedExport) -> Iterator[Graph]:
    if isinstance(loaded.system, SupportsSample):
        yield _sample_graph(loaded)
    elif isinstance(loaded.system, SupportsTranslate):
        for domain, names in enumerate(cast(SupportsTranslate, loaded.system).labels):
            yield _translate_graph(loaded, domain, names)
    elif isinstance(loaded.system, SupportsDomains):
        for target in loaded.system.targets:
            yield _domain_graph(loaded, loaded.system, target)
    else:
        raise ValueError(f"{storage.redact(loaded.url)}: --onnx: {loaded.name} generates no images; omit --onnx")


class DomainModule(nn.Module):
    """A system's `to_domain` as a function of tensors."""

    def __init__(self, loaded: LoadedExport, system: SupportsDomains, target: int) -> None:
        super().__init__()
        self.nets = nn.ModuleDict(loaded.nets)
        self._system, self._target = system, target

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self._system.to_domain(dict(self.nets.items()), images, self._target),)


def _domain_graph(loaded: LoadedExport, system: SupportsDomains, target: int) -> Graph:
    size = loaded.system.sizes[-1]
    images = GraphInput("images", "images in [-1, 1]", lambda rows: torch.rand(rows, 3, size, size) * 2 - 1)
    about = f"Images of {system.domains[1 - target]}, translated to {system.domains[target]}."
    return f"to_domain_{target}.onnx", about, DomainModule(loaded, system, target), [images]


class TranslateModule(nn.Module):
    """A system's `translate` as a function of tensors."""

    def __init__(self, loaded: LoadedExport, domain: int) -> None:
        super().__init__()
        self.nets = nn.ModuleDict(loaded.nets)
        self._system, self._domain = cast(SupportsTranslate, loaded.system), domain

    def forward(self, images: Tensor, attributes: Tensor) -> tuple[Tensor]:
        return (self._system.translate(dict(self.nets.items()), images, attributes, self._domain),)


def _translate_graph(loaded: LoadedExport, domain: int, names: tuple[str, ...]) -> Graph:
    size = loaded.system.sizes[-1]
    inputs = [
        GraphInput("images", "images in [-1, 1]", lambda rows: torch.rand(rows, 3, size, size) * 2 - 1),
        GraphInput(
            "attributes", "target, 1 or 0: " + ", ".join(names), lambda rows: torch.rand(rows, len(names)).round()
        ),
    ]
    return f"translate_{domain}.onnx", "Images with other attributes.", TranslateModule(loaded, domain), inputs


class SampleModule(nn.Module):
    """A system's `sample` as a function of tensors, among them the results of the text encoder.

    Args:
        inputs: names of the arguments, in order: noise_1, noise_2, ... and any of sentence, words, lengths, vectors.
        shapes: row shapes of these four; those that are not inputs are filled with ones.
    """

    def __init__(self, loaded: LoadedExport, inputs: list[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.nets = nn.ModuleDict({name: net for name, net in loaded.nets.items() if name != "text"})
        self._system, self._inputs, self._shapes = cast(SupportsSample, loaded.system), inputs, shapes
        self._has_text_encoder = "text" in loaded.nets

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(self._inputs, tensors, strict=True))
        rows = tensors[0].shape[0]
        for name, shape in self._shapes.items():
            if name not in values:
                dtype = torch.int64 if name == "lengths" else torch.float32
                values[name] = torch.ones((rows, *shape), dtype=dtype)
        tokens = torch.zeros((rows, self._shapes["words"][1]), dtype=torch.int64)
        noises = iter([values[name] for name in self._inputs if name.startswith("noise_")])
        nets: dict[str, Any] = dict(self.nets.items())
        if self._has_text_encoder:
            nets["text"] = lambda tokens, lengths: (values["words"], values["sentence"])
        captions = Captions(tokens, values["lengths"], values["vectors"])
        return self._system.sample(nets, captions, lambda *shape: next(noises)).images


INPUT_DESCRIPTIONS = {
    "sentence": "sentence vectors of the network `text`",
    "words": "word vectors of the network `text`, zeros after the end of a caption",
    "lengths": "number of words of each caption",
    "vectors": "sentence vectors of the encoder that was used for the data",
}


def _sample_graph(loaded: LoadedExport) -> Graph:
    shapes, noises = _sample_input_shapes(loaded)

    def make(name: str, shape: tuple[int, ...]) -> Callable[[int], Tensor]:
        if name == "lengths":
            return lambda rows: torch.randint(1, loaded.build_info.max_words + 1, (rows, *shape))
        return lambda rows: torch.randn(rows, *shape)

    inputs = [
        GraphInput(f"noise_{i + 1}", "standard normal", make("noise", shape)) for i, shape in enumerate(noises)
    ] + [GraphInput(name, INPUT_DESCRIPTIONS[name], make(name, shape)) for name, shape in shapes.items()]
    used = _used_inputs(SampleModule(loaded, [tensor.name for tensor in inputs], shapes), inputs)
    inputs = [tensor for tensor, is_used in zip(inputs, used, strict=True) if is_used]
    if not inputs:
        raise ValueError(
            f"{storage.redact(loaded.url)}: --onnx: {loaded.name} draws the same image from any input; omit --onnx"
        )
    graph = SampleModule(loaded, [tensor.name for tensor in inputs], shapes)
    about = "Noise and text to images." if len(inputs) > len(noises) else "Noise to images."
    return "draw.onnx", about, graph, inputs


def _sample_input_shapes(loaded: LoadedExport) -> tuple[dict[str, tuple[int, ...]], list[tuple[int, ...]]]:
    """Return the shapes, without the batch dimension, of the text inputs by name and of each call for noise."""
    rows, max_words = 2, loaded.build_info.max_words
    tokens, lengths = torch.zeros(rows, max_words, dtype=torch.int64), torch.full((rows,), max_words)
    shapes: dict[str, tuple[int, ...]] = {"sentence": (0,), "words": (0, max_words)}
    noises: list[tuple[int, ...]] = []

    def noise(*shape: int) -> Tensor:
        noises.append(shape)
        return torch.randn(rows, *shape)

    with torch.no_grad():
        if "text" in loaded.nets:
            words, sentence = loaded.nets["text"](tokens, lengths)
            shapes = {"sentence": tuple(sentence.shape[1:]), "words": tuple(words.shape[1:])}
        vectors = torch.randn(rows, loaded.build_info.data.vector_dim)
        cast(SupportsSample, loaded.system).sample(loaded.nets, Captions(tokens, lengths, vectors), noise)
    return {**shapes, "lengths": (), "vectors": (loaded.build_info.data.vector_dim,)}, noises


def _used_inputs(graph: nn.Module, inputs: list[GraphInput]) -> list[bool]:
    """Determine which inputs affect the images."""
    base = [tensor.make(8) for tensor in inputs]
    used = []
    with torch.no_grad():
        expected = graph(*base)
        for i, tensor in enumerate(inputs):
            changed = graph(*base[:i], tensor.make(8), *base[i + 1 :])
            used.append(any(not torch.equal(a, b) for a, b in zip(expected, changed, strict=True)))
    return used


def _to_onnx(graph: nn.Module, inputs: list[GraphInput], outputs: list[str]) -> bytes:
    rows = tuple({0: torch.export.Dim("N")} for _ in inputs)
    with _without_exporter_warnings():
        program = torch.onnx.export(
            graph.eval(), tuple(tensor.make(2) for tensor in inputs), dynamo=True, verbose=False, opset_version=OPSET,
            input_names=[tensor.name for tensor in inputs], output_names=outputs,
            dynamic_shapes=(rows,) if isinstance(graph, SampleModule) else rows,  # its forward has *args
        )  # fmt: skip
    assert program is not None
    data: bytes = program.model_proto.SerializeToString()
    return data


@contextmanager
def _without_exporter_warnings() -> Iterator[None]:
    """Suppress warnings of the exporter about packages that are not needed."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _max_difference(data: bytes, graph: nn.Module, inputs: list[GraphInput]) -> float:
    """Return the largest pixel difference between ONNX Runtime and torch, for another number of rows than exported."""
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    values = [tensor.make(3) for tensor in inputs]
    with torch.no_grad():
        expected = graph(*values)
    actual = session.run(None, {tensor.name: value.numpy() for tensor, value in zip(inputs, values, strict=True)})
    return max(float((a - torch.from_numpy(b)).abs().max()) for a, b in zip(expected, actual, strict=True))
