"""The run's configuration: frozen dataclasses, and the strict loader that fills them."""

from t2idist.config.loading import configs_folder, load, recipes
from t2idist.config.schema import (
    DEEPSPEED,
    EXPORT_BY_SYSTEM,
    EXPORT_R_PRECISION,
    METRICS,
    PRECISIONS,
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    GuardConfig,
    ReportConfig,
    RunConfig,
    ScoresConfig,
    StageConfig,
)

__all__ = [
    "DEEPSPEED",
    "EXPORT_BY_SYSTEM",
    "EXPORT_R_PRECISION",
    "METRICS",
    "PRECISIONS",
    "CheckpointConfig",
    "ClusterConfig",
    "DataConfig",
    "GuardConfig",
    "ReportConfig",
    "RunConfig",
    "ScoresConfig",
    "StageConfig",
    "configs_folder",
    "load",
    "recipes",
]
