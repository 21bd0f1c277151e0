"""Hugging Face folders to Megatron-Core checkpoints and back, on any tensor- and pipeline-parallel layout.

- `mapping/`: the families, each with a table of parameters and a reader of `config.json` (`families`, `llama/`),
  how a table's rows make up Megatron's tensors (`param_map`), and which rank of a layout holds what
- `hugging_face/` and `torch_dist/`: reading and writing the two formats
- `stream_import`, `stream_export`: from file to file in bounded memory; `model_export`: from a model in memory;
  `bridge`: by Megatron-Bridge
- `compare`: weights bit for bit; `dry_run`: what a conversion and a layout would do

Nothing here imports Megatron until a model is handed in, so that `platform.enable_cpu()` can run first.
"""

from megatron_erpd.checkpoint.compare import compare_weights
from megatron_erpd.checkpoint.hugging_face.sidecar import copy_sidecar
from megatron_erpd.checkpoint.mapping.config import ModelShape, flags_to_argv, model_flags, read_model_shape
from megatron_erpd.checkpoint.model_export import export_hf_weights, parameter_group
from megatron_erpd.checkpoint.stream_export import export_checkpoint
from megatron_erpd.checkpoint.stream_import import write_checkpoint

__all__ = [
    "ModelShape",
    "compare_weights",
    "copy_sidecar",
    "export_checkpoint",
    "export_hf_weights",
    "flags_to_argv",
    "model_flags",
    "parameter_group",
    "read_model_shape",
    "write_checkpoint",
]
