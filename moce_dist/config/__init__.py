"""Typed configuration: one frozen tree, YAML files of non-default values, `--set` overrides.

sections.py   fields, defaults, bounds and roles of every section except transfers
transfer.py   the transfer section
tree.py       the complete configuration, and the rules between its fields
loading.py    files and overrides to a checked configuration, and back to YAML
"""

from moce_dist.config.loading import (
    checked,
    identity,
    load_config,
    make_config,
    read_resolved,
    roles,
    to_yaml,
)
from moce_dist.config.sections import (
    WEIGHT_FILES,
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    GateConfig,
    HardwareConfig,
    LoggingConfig,
    ModelConfig,
    MoeConfig,
    ParallelConfig,
    Role,
    RunConfig,
    StageConfig,
    legal_worker_counts,
)
from moce_dist.config.transfer import (
    ContinuedConfig,
    DetectionConfig,
    FinetuneConfig,
    SegmentationConfig,
    Selection,
    SuiteEntry,
    TransferConfig,
)
from moce_dist.config.tree import Config

__all__ = [
    "WEIGHT_FILES",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "ContinuedConfig",
    "DataConfig",
    "DetectionConfig",
    "FinetuneConfig",
    "GateConfig",
    "HardwareConfig",
    "LoggingConfig",
    "ModelConfig",
    "MoeConfig",
    "ParallelConfig",
    "Role",
    "RunConfig",
    "SegmentationConfig",
    "Selection",
    "StageConfig",
    "SuiteEntry",
    "TransferConfig",
    "checked",
    "identity",
    "legal_worker_counts",
    "load_config",
    "make_config",
    "read_resolved",
    "roles",
    "to_yaml",
]
