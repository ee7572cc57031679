"""The run's configuration: frozen dataclasses, and the strict loader that fills them."""

from t2idist.config.schema import (
    DEEPSPEED,
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
    configs_folder,
    load,
    recipes,
)

__all__ = [
    "DEEPSPEED",
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
