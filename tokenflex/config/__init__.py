"""Every knob of a run: `schema` documents them, `load` reads YAML files and command-line overrides strictly."""

from .load import apply_overrides, describe, load_config, save_config
from .schema import (
    BudgetConfig,
    DataConfig,
    EmbeddedCorpusConfig,
    EvaluateConfig,
    ModelConfig,
    OptimizerConfig,
    PartConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "BudgetConfig",
    "DataConfig",
    "EmbeddedCorpusConfig",
    "EvaluateConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PartConfig",
    "RunConfig",
    "TrainConfig",
    "apply_overrides",
    "describe",
    "load_config",
    "save_config",
]
