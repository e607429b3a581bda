"""The configuration: Hydra composes `conf/`, dataclasses validate it, and a wrong value gives a one-sentence error.

It imports no torch, so a typo is reported within seconds. Every key belongs to a dataclass, one file per topic;
`TrainConfig` puts them together. `load_config` reads command-line overrides, `stored_config` reads the configuration
that a run has saved, and `run_command` is the entry point of every script:

    config = load_config(TrainConfig, ["run_dir=runs/a", "data.manifest=corpus/manifest.json"], "config")
    config.model.n_layers
"""

from pretrain.config.cluster import ClusterConfig, PreflightConfig
from pretrain.config.command_line import run_command
from pretrain.config.data import BadChunk, DataConfig, Packing, SourceConfig, StageConfig
from pretrain.config.engine import EngineConfig
from pretrain.config.load import load_config, stored_config, to_dict, validate
from pretrain.config.model import (
    AttentionKernel,
    KernelsConfig,
    ModelConfig,
    Pooling,
    Precision,
    Recompute,
    RopeScalingConfig,
    RopeType,
    Switch,
)
from pretrain.config.objective import LoraConfig, MlmConfig, Objective
from pretrain.config.optimizer import EmaConfig, OptimConfig, OptimizerName, ScheduleConfig, ScheduleName
from pretrain.config.records import EvaluationConfig, LoggingConfig, WandbMode
from pretrain.config.run import AUTO, SubmitConfig, TrainConfig
from pretrain.config.upkeep import (
    CheckpointConfig,
    LossGuardConfig,
    SpikeAction,
    ThinDtype,
    WatchdogConfig,
    Weights,
    Which,
)

__all__ = [
    "AUTO",
    "AttentionKernel",
    "BadChunk",
    "CheckpointConfig",
    "ClusterConfig",
    "DataConfig",
    "EmaConfig",
    "EngineConfig",
    "EvaluationConfig",
    "KernelsConfig",
    "LoggingConfig",
    "LoraConfig",
    "LossGuardConfig",
    "MlmConfig",
    "ModelConfig",
    "Objective",
    "OptimConfig",
    "OptimizerName",
    "Packing",
    "Pooling",
    "Precision",
    "PreflightConfig",
    "Recompute",
    "RopeScalingConfig",
    "RopeType",
    "ScheduleConfig",
    "ScheduleName",
    "SourceConfig",
    "SpikeAction",
    "StageConfig",
    "SubmitConfig",
    "Switch",
    "ThinDtype",
    "TrainConfig",
    "WandbMode",
    "WatchdogConfig",
    "Weights",
    "Which",
    "load_config",
    "run_command",
    "stored_config",
    "to_dict",
    "validate",
]
