"""The run's configuration: frozen dataclasses, and the strict loader that fills them from YAML and words."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t2idist.config.strict import from_dict, parse_yaml, to_dict, unknown_key

PRECISIONS = ("bfloat16", "float32", "float64")
METRICS = ("fid", "kid", "is", "prdc", "r_precision", "clip_r", "damsm_r", "memorisation")
"""What evaluate/score.py measures."""
DEEPSPEED = "0.19.8"
"""The one version that works: engine/zero.py reads attributes that DeepSpeed does not promise."""


def _positive(config: Any, where: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not value > 0:
            raise ValueError(f"{where}.{name}: {value}; it must be above 0")


def _check_deepspeed() -> None:
    try:
        found = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        found = "not installed"
    if found != DEEPSPEED:
        raise ValueError(f"strategy: deepspeed is {found}; install it with: pip install deepspeed=={DEEPSPEED}")


def _check_seed(where: str, seed: int) -> None:
    if not 0 <= seed < 2**31:
        raise ValueError(f"{where}: {seed}; allowed are 0 to {2**31 - 1}")


# ------------------------------------------------------------ what a run is
@dataclass(frozen=True)
class DataConfig:
    """Which pictures and captions, and how they are read.

    source: "avatars" (made on first use), "emoji" (shipped with the package) or the URL of a shard set. beside: more of
    them, which take turns with `source`, a step each, for systems that learn from several (stargan).
    samples, size: number and pixels of avatars to make. max_words: longer captions lose random words (training) or
    their end (evaluation). vectors_mean_of: where data comes with sentence vectors, a picture's vector in training is
    the mean of so many of its own, drawn at random (Reed et al. 2016: 4 for CUB, 3 for COCO). crop: the shorter side is
    resized to crop * size, then cropped at random; 1 = no crop. threads: that decode. prefetch_mib: memory for samples
    that are read or decoded ahead. max_bad: share of samples that may be unusable before the run stops. cache: folder
    for avatars and cached shards (none: ~/.cache/t2idist). cache_gib: how much of a remote data set's shards may lie
    there (0: read by ranges only). endpoint_url: the address of an S3 service (MinIO, Ceph, SeaweedFS) where it is not
    the environment's.
    """

    source: str = "avatars"
    beside: tuple[str, ...] = ()
    samples: int = 4000
    size: int = 64
    max_words: int = 18
    vectors_mean_of: int = 1
    crop: float = 76 / 64
    flip: bool = True
    threads: int = 2
    prefetch_mib: int = 256
    max_bad: float = 0.01
    cache: str | None = None
    cache_gib: float = 0.0
    endpoint_url: str | None = None

    def __post_init__(self) -> None:
        if self.endpoint_url is not None and "@" in self.endpoint_url:
            raise ValueError("data.endpoint_url: credentials do not belong in it; use the environment or files")
        _positive(self, "data", "samples", "size", "max_words", "vectors_mean_of", "threads", "prefetch_mib")
        if not 0.0 <= self.max_bad <= 1.0:
            raise ValueError(f"data.max_bad: {self.max_bad}; allowed are 0 (none) to 1 (any share of the samples)")
        if not 0.0 <= self.cache_gib <= 1e6:
            raise ValueError(f"data.cache_gib: {self.cache_gib}; allowed are 0 (no cache) and more")
        if not 1.0 <= self.crop <= 4.0:
            raise ValueError(f"data.crop: {self.crop}; allowed are 1 (no crop) to 4")


@dataclass(frozen=True)
class StageConfig:
    """One stage: a system, its scale and its budget.

    group_size: samples that share BatchNorm statistics and negatives (the paper's batch size). groups: how many such
    groups make a step. images: budget in images. uses: for each export slot of the system, the name of an earlier stage
    or the URL of an export. model: the system's own settings (``Config`` in systems/<system>.py). data: over the run's
    data settings. seed: another one than the run's (a judge's, say). scores_every_images: how often the averaged
    weights are scored (0: not in training); what is measured is in `RunConfig.scores`. init_from: the URL of an export
    whose networks the stage's training starts from, those that both have ("": fresh weights).
    """

    system: str
    group_size: int
    groups: int
    images: int
    uses: dict[str, str] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    max_groups_per_worker: int = 64
    data: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    checkpoint_every_images: int = 50_000
    pictures_every_images: int = 50_000
    scores_every_images: int = 0
    init_from: str = ""

    @property
    def images_per_step(self) -> int:
        return self.group_size * self.groups

    @property
    def steps(self) -> int:
        return -(-self.images // self.images_per_step)

    @property
    def smallest_world(self) -> int:
        return -(-self.groups // self.max_groups_per_worker)


@dataclass(frozen=True)
class CheckpointConfig:
    """How a stage's state is kept.

    keep: how many of the newest committed checkpoints stay. keep_every_images: one for each so many images stays too
    (0: none). when_busy: where one is due while the one before is still being written, "wait" for it or "skip". memory:
    keep copies in the memory of the cluster's machines too. memory_every_steps: how often (0: as often as it costs less
    than a hundredth of the time).
    """

    keep: int = 2
    keep_every_images: int = 0
    when_busy: str = "wait"
    memory: bool = True
    memory_every_steps: int = 0

    def __post_init__(self) -> None:
        _positive(self, "checkpoint", "keep")
        if self.keep_every_images < 0:
            raise ValueError(f"checkpoint.keep_every_images: {self.keep_every_images}; it must be at least 0")
        if self.memory_every_steps < 0:
            raise ValueError(f"checkpoint.memory_every_steps: {self.memory_every_steps}; it must be at least 0")
        if self.when_busy not in ("wait", "skip"):
            raise ValueError(f"checkpoint.when_busy: '{self.when_busy}'; allowed are wait and skip")


@dataclass(frozen=True)
class GuardConfig:
    """What happens to steps whose losses or gradients are not finite: each is skipped.

    skips_in_a_row: so many lead back to the last checkpoint, with fresh noise. rollbacks: after so many of a stage the
    run ends.
    """

    skips_in_a_row: int = 10
    rollbacks: int = 3

    def __post_init__(self) -> None:
        _positive(self, "guard", "skips_in_a_row")
        if self.rollbacks < 0:
            raise ValueError(f"guard.rollbacks: {self.rollbacks}; it must be at least 0")


@dataclass(frozen=True)
class ReportConfig:
    """What a person sees.

    captions: fixed captions of the grids (none: taken from the test split). draws: noise draws per caption. ledger:
    keep the ids of the samples of every step in {stage}/ledger/. json_logs: progress and log lines are JSON, with run,
    stage, rank and images.
    """

    captions: tuple[str, ...] = ()
    draws: int = 4
    ledger: bool = False
    json_logs: bool = False

    def __post_init__(self) -> None:
        _positive(self, "report", "draws")


@dataclass(frozen=True)
class ScoresConfig:
    """Scores during training, by a process of its own beside the first worker's, which goes on meanwhile.

    metrics, n, real, train, extractor, weights, weights_sha256, judge, device: as options of evaluate/score.py. best:
    the row by which the best weights are kept ("": none are). share: of the wall time, the most that scoring takes;
    what does not fit is left out.
    """

    metrics: tuple[str, ...] = ("kid",)
    n: int = 1000
    real: int = 1000
    train: int = 2000
    extractor: str = "efficientnet-lite0"
    weights: str = ""
    weights_sha256: str = ""
    judge: str = ""
    device: str = "cpu"
    best: str = "kid"
    share: float = 0.02

    def __post_init__(self) -> None:
        _positive(self, "scores", "n", "real", "train", "share")
        if unknown := [name for name in self.metrics if name not in METRICS]:
            raise ValueError(f"scores.metrics: '{unknown[0]}'; there are {', '.join(METRICS)}")
        if self.share > 1:
            raise ValueError(f"scores.share: {self.share}; it is a share of the wall time, at most 1")


@dataclass(frozen=True)
class ClusterConfig:
    """How many workers, and what each one takes.

    workers: a number, or [smallest, largest]: the run takes what the cluster has between the two. gpus_per_worker: 0 or
    1. max_failures: failures of workers that restart them before the run gives up, and as many of Ray's controller.
    dead_after_seconds: a worker that does not answer for so long is given up. hung_after_seconds: a collective that
    takes longer counts as a failure. start_within_seconds: workers that are not all there by then are asked for again,
    as many as the cluster then has. grow_after_seconds: how often the run looks whether it can have more workers.
    wait_seconds: how long a cluster that is joined may take to have room for the smallest number (machines come up).
    address: of a running Ray cluster; "auto": the one this process belongs to, else this machine.
    """

    workers: tuple[int, int] = (1, 1)
    cpus_per_worker: float = 1.0
    gpus_per_worker: int = 0
    max_failures: int = 10
    dead_after_seconds: float = 10.0
    hung_after_seconds: float = 60.0
    start_within_seconds: float = 60.0
    grow_after_seconds: float = 30.0
    wait_seconds: float = 600.0
    address: str = "auto"

    def __post_init__(self) -> None:
        smallest, largest = self.workers
        if not 1 <= smallest <= largest:
            raise ValueError(
                f"cluster.workers: {list(self.workers)}; give a number of at least 1, or [smallest, largest]"
            )
        if self.gpus_per_worker not in (0, 1):
            raise ValueError(f"cluster.gpus_per_worker: {self.gpus_per_worker}; allowed are 0 and 1")
        _positive(self, "cluster", "cpus_per_worker", "dead_after_seconds", "hung_after_seconds")
        _positive(self, "cluster", "start_within_seconds", "grow_after_seconds")
        if self.wait_seconds < 0:
            raise ValueError(f"cluster.wait_seconds: {self.wait_seconds:g}; give 0 or more")


@dataclass(frozen=True)
class RunConfig:
    """A whole run.

    name: the folder under `storage`; the same name again resumes. about: said in the first line. strategy: "ddp" (every
    worker holds the whole optimiser) or "deepspeed". zero: what DeepSpeed divides among the workers: 1: the optimiser's
    state, 2: the gradients too (0: nothing, which is ddp). A run may change both when it resumes.
    """

    name: str
    stages: dict[str, StageConfig]
    about: str = ""
    storage: str = "runs"
    seed: int = 0
    precision: str = "bfloat16"
    strategy: str = "ddp"
    zero: int = 0
    data: DataConfig = DataConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    report: ReportConfig = ReportConfig()
    scores: ScoresConfig = ScoresConfig()
    cluster: ClusterConfig = ClusterConfig()

    def __post_init__(self) -> None:
        if not self.name or set(self.name) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-"):
            raise ValueError(f"name: {self.name!r}; allowed are letters, digits, '.', '_' and '-'")
        if self.name.startswith("."):
            raise ValueError(f"name: {self.name!r}; it may not begin with a dot")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: {self.precision!r}; allowed are {', '.join(PRECISIONS)}")
        self._check_strategy()
        _check_seed("seed", self.seed)
        if not self.stages:
            raise ValueError("stages: a run needs at least one stage")
        for name, stage in self.stages.items():
            if not name or set(name) - set("abcdefghijklmnopqrstuvwxyz0123456789_-"):
                raise ValueError(f"stages.{name}: allowed in a stage's name are a-z, 0-9, '_' and '-'")
            _check_seed(f"stages.{name}.seed", stage.seed or 0)
            _positive(stage, f"stages.{name}", "group_size", "groups", "images", "max_groups_per_worker")
            _positive(stage, f"stages.{name}", "checkpoint_every_images", "pictures_every_images")
            if stage.scores_every_images < 0:
                raise ValueError(f"stages.{name}.scores_every_images: {stage.scores_every_images}; 0 is never")
            self._check_scale(name, stage)

    def _check_strategy(self) -> None:
        if self.strategy not in ("ddp", "deepspeed"):
            raise ValueError(f"strategy: {self.strategy!r}; allowed are ddp and deepspeed")
        if self.strategy == "ddp":
            if self.zero != 0:
                raise ValueError(f"zero: {self.zero}; it goes with strategy: deepspeed, and the strategy is ddp")
            return
        if self.zero == 3:
            raise ValueError(
                "zero: 3; allowed are 1 and 2: stage 3 leaves no worker a whole network, which gradient penalties, "
                "frozen use and averages (EMA) need"
            )
        if self.zero not in (1, 2):
            raise ValueError(
                f"zero: {self.zero}; allowed with strategy: deepspeed are 1 (optimiser state is divided among the "
                "workers) and 2 (gradients too)"
            )
        if self.precision == "float64":
            raise ValueError("precision: float64; DeepSpeed keeps weights in float32: give strategy: ddp")
        _check_deepspeed()

    def _check_scale(self, name: str, stage: StageConfig) -> None:
        smallest, largest = self.cluster.workers
        if smallest < stage.smallest_world:
            raise ValueError(
                f"cluster.workers: {smallest} cannot hold stage {name}: {stage.groups} groups at most "
                f"{stage.max_groups_per_worker} a worker need {stage.smallest_world}"
            )
        if largest > stage.groups:
            raise ValueError(
                f"cluster.workers: {largest} is more than the {stage.groups} groups of stage {name}; a worker runs at "
                f"least one whole group: raise stages.{name}.groups or lower the workers"
            )

    def stage_seed(self, stage: str) -> int:
        """The seed of a stage: its own, or the run's."""
        own = self.stages[stage].seed
        return self.seed if own is None else own

    def stage_data(self, stage: str) -> DataConfig:
        """The data settings of a stage: the run's, with the stage's own over them."""
        return from_dict(DataConfig, {**to_dict(self.data), **self.stages[stage].data}, f"stages.{stage}.data")


# ------------------------------------------------------------ recipes and command-line words
def configs_folder() -> Path:
    """Where the recipes lie: `configs/` of the checkout, or beside the installed package."""
    package = Path(__file__).parents[1]
    return next(p for p in (package.parent / "configs", package / "configs") if p.is_dir())


def recipes() -> dict[str, list[str]]:
    """Presets by recipe name."""
    found = configs_folder()
    return {d.name: sorted(p.stem for p in d.glob("*.yaml")) for d in sorted(found.iterdir()) if d.is_dir()}


def load(recipe: str, words: Iterable[str] = ()) -> RunConfig:
    """The configuration of a recipe (a name in configs/, or a .yaml file) under ``key.path=value`` words.

    ``preset=NAME`` picks configs/<recipe>/<NAME>.yaml; the default is ``demo``. Raises ValueError with one sentence.
    """
    pairs = [_word(word) for word in words]
    presets = [value for path, value in pairs if path == ["preset"]]
    values = _read_recipe(recipe, str(presets[-1]) if presets else None)
    for path, value in pairs:
        if path != ["preset"]:
            _set(values, path, value)
    return from_dict(RunConfig, values)


def _read_recipe(recipe: str, preset: str | None) -> dict[str, Any]:
    if recipe.endswith((".yaml", ".yml")):
        if preset:
            raise ValueError(f"preset={preset}: a preset goes with a recipe's name, not with the file {recipe}")
        file = Path(recipe)
        if not file.is_file():
            raise ValueError(f"{recipe}: no such file")
    else:
        known = recipes()
        if recipe not in known:
            raise ValueError(unknown_key(recipe, recipe, known).replace("unknown key", "no such recipe"))
        preset = preset or "demo"
        if preset not in known[recipe]:
            raise ValueError(f"preset={preset}: {recipe} has {', '.join(known[recipe])}")
        file = configs_folder() / recipe / f"{preset}.yaml"
    values = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected a mapping of keys")
    return values


def _word(word: str) -> tuple[list[str], Any]:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ValueError(f"{word!r}: expected key.path=value")
    return key.split("."), parse_yaml(text, word)


def _set(values: dict[str, Any], path: list[str], value: Any) -> None:
    for i, key in enumerate(path[:-1]):
        below = values.setdefault(key, {})
        if not isinstance(below, dict):
            raise ValueError(f"{'.'.join(path)}: '{'.'.join(path[: i + 1])}' is a value, not a section")
        values = below
    values[path[-1]] = value
