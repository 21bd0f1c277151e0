"""What each stage can be told: one validated model per stage, the single source of recipe keys and flags.

A recipe's sections are these models; the tools' command lines are generated from them (`settings.arguments`), so a
key, its default, its check and its help text have one home.
`Layout` says how a stage runs, `Monitoring` what it tells whom; neither changes a result. Everything else is part of an
artifact's identity.
"""

from megatron_erpd.settings.base import Layout, Settings, error_lines, over_layout, parse_settings
from megatron_erpd.settings.distillation import AUTO_SIGNAL, NO_SIGNAL, DistillSettings, PrecomputeSettings
from megatron_erpd.settings.monitoring import Monitoring
from megatron_erpd.settings.sampling import (
    ChatSettings,
    EvaluateSettings,
    HeldOutSettings,
    ImportSettings,
    SampleSettings,
    SelectSettings,
    TemplateSettings,
)
from megatron_erpd.settings.slurm import SlurmSettings
from megatron_erpd.settings.training import (
    AdvantageKind,
    Aggregation,
    OnPolicySettings,
    OptimizerSettings,
    ReplayLoss,
    ReplaySettings,
    TrainingSettings,
)

__all__ = [
    "AUTO_SIGNAL",
    "AdvantageKind",
    "Aggregation",
    "ChatSettings",
    "DistillSettings",
    "EvaluateSettings",
    "HeldOutSettings",
    "ImportSettings",
    "Layout",
    "Monitoring",
    "NO_SIGNAL",
    "OnPolicySettings",
    "OptimizerSettings",
    "PrecomputeSettings",
    "ReplayLoss",
    "ReplaySettings",
    "SampleSettings",
    "SelectSettings",
    "Settings",
    "SlurmSettings",
    "TemplateSettings",
    "TrainingSettings",
    "error_lines",
    "over_layout",
    "parse_settings",
]
