"""The run's configuration: frozen dataclasses, filled from a recipe's YAML and ``key.path=value`` overrides."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from t2idist.config.ranges import RangeError, check_ranges
from t2idist.config.strict import from_dict, to_dict

EXPORT_BY_SYSTEM, EXPORT_R_PRECISION = "auto", "r_precision"
_Precision = Literal["auto", "bfloat16", "float32", "float64"]
PRECISIONS: tuple[_Precision, ...] = get_args(_Precision)
METRICS = ("fid", "kid", "is", "prdc", "r_precision", "clip_r", "damsm_r", "memorisation")
"""The metrics of evaluate/score.py."""
DEEPSPEED = "0.19.8"
"""The only supported version: engine/zero.py uses private attributes of DeepSpeed."""


def _check_deepspeed() -> None:
    try:
        version = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    if version != DEEPSPEED:
        raise ValueError(f"strategy: deepspeed is {version}; install it with: pip install deepspeed=={DEEPSPEED}")


def _check_seed(key: str, seed: int) -> None:
    if not 0 <= seed < 2**31:
        raise ValueError(f"{key}: {seed}; allowed are 0 to {2**31 - 1}")


# ------------------------------------------------------------ sections
@dataclass(frozen=True)
class DataConfig:
    """The training data, and how it is read."""

    source: str = "avatars"
    """either "avatars" (drawn on first use), "emoji" (shipped with the package) or the URL of a shard set"""
    beside: tuple[str, ...] = ()
    """further sources, which alternate with `source` step by step, for systems that train on several (stargan)"""
    samples: int = 4000
    """number of avatars to draw"""
    size: int = 64
    """pixels of an avatar's side"""
    max_words: int = 18
    """longer captions lose random words in training, their end in evaluation"""
    vectors_mean_of: int = 1
    """in training, average this many random sentence vectors of an image (Reed et al. 2016: 4 for CUB, 3 for COCO)"""
    crop: float = 76 / 64
    """resize the shorter side to crop * size, then crop a square of `size`; with 1 only the longer side is cropped"""
    random_crop: bool = True
    """crop at a random place in training; false: the centre, as in scores"""
    flip: bool = True
    """mirror half of the training images"""
    outlines: bool = False
    """make pairs of the images: the second of each is the image, the first its outlines (for pix2pix)"""
    threads: int | None = None
    """number of decoding threads; null is one less than `cluster.cpus_per_worker`, at least 2"""
    prefetch_mib: int = 256
    """memory for samples that are read or decoded in advance"""
    max_bad: float = 0.01
    """share of unreadable samples above which the run stops"""
    cache: str | None = None
    """folder for avatars, cached shards and decoded images; null is ~/.cache/t2idist"""
    cache_gib: float = 0.0
    """disk space on each host for shards of a remote data set and for decoded images; 0 caches neither"""
    endpoint_url: str | None = None
    """address of an S3 service (MinIO, Ceph, SeaweedFS) other than the one in the environment"""

    def __post_init__(self) -> None:
        if self.endpoint_url is not None and "@" in self.endpoint_url:
            raise RangeError("endpoint_url: credentials do not belong in it; use the environment or files")
        check_ranges(self, above_0="samples size max_words vectors_mean_of threads prefetch_mib")
        if not 0.0 <= self.max_bad <= 1.0:
            raise RangeError(f"max_bad: {self.max_bad}; allowed are 0 (none) to 1 (any share of the samples)")
        if not 0.0 <= self.cache_gib <= 1e6:
            raise RangeError(f"cache_gib: {self.cache_gib}; allowed are 0 (no cache) and more")
        if not 1.0 <= self.crop <= 4.0:
            raise RangeError(f"crop: {self.crop}; allowed are 1 to 4")


@dataclass(frozen=True)
class StageConfig:
    """One stage: a system, its scale and its budget."""

    system: str
    """name of a file in systems/"""
    group_size: int
    """samples that share BatchNorm statistics and negatives: the paper's batch size"""
    groups: int
    """number of groups per step"""
    images: int
    """budget in images"""
    uses: dict[str, str] = field(default_factory=dict)
    """for each export slot of the system, the name of an earlier stage or the URL of an export"""
    model: dict[str, Any] = field(default_factory=dict)
    """the system's own settings (``Config`` in systems/<system>.py)"""
    max_groups_per_worker: int = 64
    micro_batch_groups: int | None = None
    """groups that a worker computes at once; more take turns, with the same result; null is all, with GPUs as many as a
    worker has when the run has its largest number of workers"""
    data: dict[str, Any] = field(default_factory=dict)
    """overrides of the run's data settings"""
    seed: int | None = None
    """seed of this stage, for example of a judge; null is the run's"""
    checkpoint_every_images: int = 50_000
    pictures_every_images: int = 50_000
    scores_every_images: int = 0
    """how often the averaged weights are scored in training, as `RunConfig.scores` says; 0 is never"""
    export_best: Literal["auto", "r_precision", "last"] = "auto"
    """either "last", or "r_precision": the weights of best held-out R-precision, if the last are worse by more than
    noise; "auto" is what the system declares (damsm and char_text: r_precision)"""
    init_from: str = ""
    """URL of an export; networks that both have start from its weights; "" is fresh weights"""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            above_0="group_size groups images max_groups_per_worker micro_batch_groups checkpoint_every_images "
            "pictures_every_images",
            at_least_0="scores_every_images",
        )

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
    """How the state of a stage is saved."""

    keep: int = 2
    """number of the newest committed checkpoints to keep"""
    keep_every_images: int = 0
    """also keep one checkpoint per this many images; 0 keeps none"""
    when_busy: Literal["wait", "skip"] = "wait"
    """either "wait" or "skip" if a checkpoint is due while the previous one is still being written"""
    memory: bool = True
    """also keep replicas in the memory of the cluster's nodes"""
    memory_every_steps: int = 0
    """how often; 0 is as often as it costs less than 1% of the time"""

    def __post_init__(self) -> None:
        check_ranges(self, above_0="keep", at_least_0="keep_every_images memory_every_steps")


@dataclass(frozen=True)
class GuardConfig:
    """How many steps with losses or gradients that are not finite to tolerate; each is skipped."""

    skips_in_a_row: int = 10
    """return to the last checkpoint, with new noise, after this many consecutive skips"""
    rollbacks: int = 3
    """end the run after this many returns in one stage"""

    def __post_init__(self) -> None:
        check_ranges(self, above_0="skips_in_a_row", at_least_0="rollbacks")


@dataclass(frozen=True)
class ReportConfig:
    """Contents of the report and the logs."""

    captions: tuple[str, ...] = ()
    """fixed captions of the sample grids; empty takes some of the test split"""
    draws: int = 4
    """noise draws per caption"""
    ledger: bool = False
    """record the sample ids of every step in {stage}/ledger/"""
    json_logs: bool = False
    """write progress and log lines as JSON with run, stage, rank and images"""
    wandb: str | None = None
    """also track the run in this project of Weights & Biases: PROJECT or ENTITY/PROJECT"""
    mlflow: str | None = None
    """also track the run on the MLflow server at this address"""

    def __post_init__(self) -> None:
        check_ranges(self, above_0="draws")
        if self.wandb is not None and not re.fullmatch(r"([A-Za-z0-9_.-]+/)?[A-Za-z0-9_.-]+", self.wandb):
            raise RangeError("wandb: expected PROJECT or ENTITY/PROJECT, of letters, digits, '_', '.' and '-'")
        if self.mlflow is not None and not re.fullmatch(r"https?://[A-Za-z0-9.:\[\]_-]+(/[^?#@\s]*)?", self.mlflow):
            raise RangeError(
                "mlflow: expected an address such as http://host:5000; credentials do not belong in it: set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            )


@dataclass(frozen=True)
class ScoresConfig:
    """Scores during training, computed by a background process next to the first worker.

    metrics, n, real, train, extractor, weights, weights_sha256, judge and device are the options of ``t2idist score``.
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
    """metric by which the best weights are kept; "" keeps none"""
    share: float = 0.02
    """largest share of the machine's time for scoring, over all its cores; scores that do not fit are skipped.

    1: no limit, and a stage ends when its last weights are scored.
    """

    def __post_init__(self) -> None:
        check_ranges(self, above_0="n real train share")
        if unknown := [name for name in self.metrics if name not in METRICS]:
            raise ValueError(f"scores.metrics: '{unknown[0]}'; there are {', '.join(METRICS)}")
        if self.share > 1:
            raise ValueError(f"scores.share: {self.share}; it is a share of the machine's time, at most 1")


@dataclass(frozen=True)
class ClusterConfig:
    """Number of workers, resources of each, and timeouts."""

    workers: tuple[int, int] = (1, 1)
    """a number, or [smallest, largest]: the run takes what the cluster has between the two"""
    cpus_per_worker: float = 1.0
    gpus_per_worker: int = 0
    """0 or 1"""
    max_failures: int = 10
    """restarts after failed workers before the run gives up, and as many of Ray's controller"""
    dead_after_seconds: float | None = None
    """a worker that does not respond for this long is lost; null is 20 steps, within 5 to 10 s (GPUs: 15 to 30 s)"""
    hung_after_seconds: float = 60.0
    """a collective that takes longer counts as a failure"""
    start_within_seconds: float | None = None
    """if some workers have not started by then, request as many as the cluster then has; null is 60, with GPUs 180"""
    spares: int | None = None
    """processes of every node that are ready to replace a lost worker; null is 1, on a cluster of the run's own 0"""
    grow_after_seconds: float = 30.0
    """how often to check whether the cluster has room for more workers"""
    wait_seconds: float = 600.0
    """how long to wait until a joined cluster has room for the smallest number (nodes may be starting)"""
    address: str = "auto"
    """address of a Ray cluster; "auto" is the one this process belongs to, else this machine"""
    require_token: bool = False
    """refuse to join a Ray cluster without token authentication, instead of warning"""

    def __post_init__(self) -> None:
        smallest, largest = self.workers
        if not 1 <= smallest <= largest:
            raise ValueError(
                f"cluster.workers: {list(self.workers)}; expected a number of at least 1, or [smallest, largest]"
            )
        if self.gpus_per_worker not in (0, 1):
            raise ValueError(f"cluster.gpus_per_worker: {self.gpus_per_worker}; allowed are 0 and 1")
        check_ranges(
            self,
            above_0="cpus_per_worker dead_after_seconds hung_after_seconds start_within_seconds grow_after_seconds",
            at_least_0="max_failures wait_seconds spares",
        )

    @property
    def dead_seconds(self) -> float:
        return self.dead_after_seconds or (30.0 if self.gpus_per_worker else 10.0)

    def spare_processes(self, own_cluster: bool) -> int:
        return self.spares if self.spares is not None else 0 if own_cluster else 1

    @property
    def start_seconds(self) -> float:  # a GPU worker reads gigabytes of libraries first
        return self.start_within_seconds or (180.0 if self.gpus_per_worker else 60.0)


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    name: str
    """folder below `storage`; submitting the same name again resumes the run"""
    stages: dict[str, StageConfig]
    about: str = ""
    """printed as the first line"""
    storage: str = "runs"
    """folder or URL for run folders"""
    seed: int = 0
    precision: _Precision = "auto"
    """one of `PRECISIONS`; bfloat16 is autocast, the weights stay float32; auto is bfloat16 if all devices that start
    the run have instructions for it, else float32"""
    tf32: bool = False
    """let float32 products and convolutions on CUDA round their inputs to 10 bits"""
    deterministic: bool = False
    """on CUDA, use slower kernels that add in a fixed order, so that a resumed run has the same weights"""
    cuda_graphs: Literal["never", "auto"] = "never"
    """auto: on CUDA and with one worker, record a step once and repeat it, if it equals a launched one; may change on
    resume"""
    strategy: Literal["ddp", "deepspeed"] = "ddp"
    """either "ddp" (every worker has the whole optimizer) or "deepspeed"; may change when the run resumes"""
    zero: int = 0
    """what DeepSpeed partitions: 1 the optimizer state, 2 also the gradients; 0 with ddp; may change on resume"""
    gradients: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 sends half the bytes between the workers, with ddp; may change on resume"""
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
            raise ValueError(f"name: {self.name!r}; it must not start with a dot")
        self._check_strategy()
        _check_seed("seed", self.seed)
        if not self.stages:
            raise ValueError("stages: a run needs at least one stage")
        for name, stage in self.stages.items():
            if not name or set(name) - set("abcdefghijklmnopqrstuvwxyz0123456789_-"):
                raise ValueError(f"stages.{name}: allowed in a stage's name are a-z, 0-9, '_' and '-'")
            _check_seed(f"stages.{name}.seed", stage.seed or 0)
            self._check_scale(name, stage)

    def groups_at_once(self, stage: StageConfig) -> int:
        """Return the most groups of a stage that a worker computes at once."""
        most = -(-stage.groups // self.cluster.workers[self.cluster.gpus_per_worker > 0])
        return min(stage.micro_batch_groups or most, most)

    def _check_strategy(self) -> None:
        if self.strategy == "ddp":
            if self.zero != 0:
                raise ValueError(f"zero: {self.zero}; it needs strategy: deepspeed, and the strategy is ddp")
            return
        if self.gradients != "float32":
            raise ValueError(f"gradients: {self.gradients}; DeepSpeed sends them in float32: use strategy: ddp")
        if self.zero == 3:
            raise ValueError(
                "zero: 3; allowed are 1 and 2: with stage 3 no worker has a whole network, which gradient penalties, "
                "frozen networks and averages (EMA) need"
            )
        if self.zero not in (1, 2):
            raise ValueError(
                f"zero: {self.zero}; allowed with strategy: deepspeed are 1 (optimizer state is partitioned among the "
                "workers) and 2 (gradients too)"
            )
        if self.precision == "float64":
            raise ValueError("precision: float64; DeepSpeed keeps weights in float32: use strategy: ddp")
        _check_deepspeed()

    def _check_scale(self, name: str, stage: StageConfig) -> None:
        smallest, largest = self.cluster.workers
        if smallest < stage.smallest_world:
            raise ValueError(
                f"cluster.workers: {smallest} cannot run stage {name}: {stage.groups} groups, at most "
                f"{stage.max_groups_per_worker} per worker (max_groups_per_worker); give at least "
                f"cluster.workers={stage.smallest_world}"
            )
        if largest > stage.groups:
            raise ValueError(
                f"cluster.workers: {largest} is more than the {stage.groups} groups of stage {name}; a worker runs at "
                f"least one whole group: lower the workers, or give {' '.join(self._enough_groups(largest))}"
            )

    def _enough_groups(self, workers: int) -> Iterator[str]:
        """Return the setting of every stage that has too few groups for the workers."""
        return (f"stages.{name}.groups={workers}" for name, stage in self.stages.items() if workers > stage.groups)

    def stage_seed(self, stage: str) -> int:
        """Return the seed of a stage: its own, or the run's."""
        own = self.stages[stage].seed
        return self.seed if own is None else own

    def stage_data(self, stage: str) -> DataConfig:
        """Return the data settings of a stage: the run's, overridden by the stage's own."""
        data = from_dict(DataConfig, {**to_dict(self.data), **self.stages[stage].data}, f"stages.{stage}.data")
        return data if data.threads else replace(data, threads=max(2, int(self.cluster.cpus_per_worker) - 1))
