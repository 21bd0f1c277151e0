"""Hugging Face folders to Megatron-Core models and back, on any tensor- and pipeline-parallel layout.

`hf_config` derives Megatron's flags from `config.json`, `param_map` is the one table of parameter names and row
layouts. `stream_import` and `stream_export` move weights through it from file to file in bounded memory, by way of
`hf_weights` and `shard_writer` (safetensors), `torch_dist` and `torch_dist_writer` (Megatron's format); `hf_export`
writes a model that is in memory. `sidecar` copies all that is not weights, `verify` compares weights and logits.
Nothing here imports Megatron until a model is handed in, so that `platform.enable_cpu()` can run first.
"""

from megatron_erpd.checkpoint.hf_export import export_hf_weights
from megatron_erpd.checkpoint.hugging_face.sidecar import copy_sidecar
from megatron_erpd.checkpoint.mapping.config import ModelShape, flags_to_argv, model_flags, read_model_shape
from megatron_erpd.checkpoint.stream_export import export_checkpoint
from megatron_erpd.checkpoint.stream_import import write_checkpoint
from megatron_erpd.checkpoint.verify import LogitComparison, compare_logits, compare_weights, megatron_logits

__all__ = [
    "LogitComparison",
    "ModelShape",
    "compare_logits",
    "compare_weights",
    "copy_sidecar",
    "export_checkpoint",
    "export_hf_weights",
    "flags_to_argv",
    "megatron_logits",
    "model_flags",
    "read_model_shape",
    "write_checkpoint",
]
