"""Every knob of a run: `schema` documents them, `load` reads YAML files and command-line overrides strictly."""

from .load import apply_overrides, describe, load_config, save_config
from .schema import (
    AdapterConfig,
    BudgetConfig,
    CostConfig,
    DataConfig,
    EmbeddedCorpusConfig,
    EvaluateConfig,
    ModelConfig,
    OptimizerConfig,
    PartConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
    as_probabilities,
)

__all__ = [
    "AdapterConfig",
    "BudgetConfig",
    "CostConfig",
    "DataConfig",
    "EmbeddedCorpusConfig",
    "EvaluateConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PartConfig",
    "RunConfig",
    "SourceConfig",
    "TrainConfig",
    "apply_overrides",
    "as_probabilities",
    "describe",
    "load_config",
    "save_config",
]
