"""Every configuration dataclass, and their conversion from and to TOML.

In: values from a TOML file or the command line. Out: frozen dataclasses whose cross-field checks
have passed. Imports neither JAX nor the command-line parser, so that `--help` stays fast.
"""

from ivl_jax.config.checks import ConfigError, require
from ivl_jax.config.data import DataConfig, RowsConfig
from ivl_jax.config.files import (
    config_from_mapping,
    config_to_mapping,
    config_to_toml,
    load_config,
    train_config_of,
)
from ivl_jax.config.generation import (
    LARGEST_LOGIT_BIAS,
    LARGEST_STRENGTH,
    MOST_LOGIT_BIASES,
    GenerationKeywords,
    GenerationOptions,
    logit_bias_problem,
    options_with,
    strength_problem,
)
from ivl_jax.config.infer import InferConfig, check_infer_config
from ivl_jax.config.model import (
    LONGEST_DRAFT,
    NGRAM_DRAFT,
    AttentionName,
    ComposedModelConfig,
    DType,
    LayoutName,
    MeshConfig,
    ModelConfig,
    RuntimeConfig,
    model_problems,
)
from ivl_jax.config.objectives import DistilConfig, GrpoConfig, PreferenceConfig
from ivl_jax.config.processes import ProcessesConfig
from ivl_jax.config.serve import (
    MODEL_NAME,
    SMALLEST_PREFILL_BLOCK,
    NamedModel,
    ServeConfig,
    check_serve_config,
    is_model_name,
)
from ivl_jax.config.strength import (
    CONSTANT,
    FULL_STRENGTH,
    LARGEST_SCALE,
    SMALLEST_SCALE,
    StrengthPolicy,
    policy_scale_problem,
)
from ivl_jax.config.train import (
    AugmentationConfig,
    BaseConfig,
    LoggingConfig,
    OptimizerConfig,
    PenaltyConfig,
    PenaltyKind,
    PenaltyPositions,
    PenaltySchedule,
    StepConfig,
    TrackerName,
    TrainConfig,
    check_train_config,
)
from ivl_jax.config.unused import unused_options
from ivl_jax.config.value import CONNECTIONS, LoraConfig, LoraTargets, ValueConfig, is_connection

__all__ = [
    "CONNECTIONS",
    "CONSTANT",
    "FULL_STRENGTH",
    "LARGEST_LOGIT_BIAS",
    "LARGEST_SCALE",
    "LARGEST_STRENGTH",
    "LONGEST_DRAFT",
    "MODEL_NAME",
    "MOST_LOGIT_BIASES",
    "NGRAM_DRAFT",
    "SMALLEST_PREFILL_BLOCK",
    "SMALLEST_SCALE",
    "AttentionName",
    "AugmentationConfig",
    "BaseConfig",
    "ComposedModelConfig",
    "ConfigError",
    "DType",
    "DataConfig",
    "DistilConfig",
    "GenerationKeywords",
    "GenerationOptions",
    "GrpoConfig",
    "InferConfig",
    "LayoutName",
    "LoggingConfig",
    "LoraConfig",
    "LoraTargets",
    "MeshConfig",
    "ModelConfig",
    "NamedModel",
    "OptimizerConfig",
    "PenaltyConfig",
    "PenaltyKind",
    "PenaltyPositions",
    "PenaltySchedule",
    "PreferenceConfig",
    "ProcessesConfig",
    "RowsConfig",
    "RuntimeConfig",
    "ServeConfig",
    "StepConfig",
    "StrengthPolicy",
    "TrackerName",
    "TrainConfig",
    "ValueConfig",
    "check_infer_config",
    "check_serve_config",
    "check_train_config",
    "config_from_mapping",
    "config_to_mapping",
    "config_to_toml",
    "is_connection",
    "is_model_name",
    "load_config",
    "logit_bias_problem",
    "model_problems",
    "options_with",
    "policy_scale_problem",
    "require",
    "strength_problem",
    "train_config_of",
    "unused_options",
]
