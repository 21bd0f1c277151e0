"""What the server of `tests/forked.py` imports once, for all processes that are forked from it."""

import argparse
import functools
import gc
import importlib
import pkgutil

import torch.distributed  # noqa: F401
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

import megatron_erpd
from megatron_erpd import platform
from tests import forked

# On a GPU, processes import what they need: a process can't be forked from one that has used CUDA.
if platform.enable_cpu():
    for library in (
        *("megatron.training", "megatron.training.argument_utils", "megatron.core.models.gpt.gpt_layer_specs"),
        *("megatron.core.dist_checkpointing.strategies.torch", "transformers.models.qwen3.modeling_qwen3"),
        # What a stage would import only on its way.
        *("megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader", "pandas"),
        *("megatron.core.dist_checkpointing.gpt_checkpoint_interop", "megatron.core.models.mimo.optimizer"),
        *("megatron.core.tokenizers.text.models", "transformers.models.auto.tokenization_auto"),
        *("torch.utils.serialization", "pyarrow.pandas_compat", "pytest"),
    ):
        importlib.import_module(library)
    for module in pkgutil.walk_packages(megatron_erpd.__path__, "megatron_erpd."):
        if "triton" not in module.name:
            importlib.import_module(module.name)

    # The help of Megatron's flags, which every parser of them takes from the source code of its dataclasses.
    from megatron.training.argument_utils import ArgumentGroupFactory
    from megatron.training.arguments import add_megatron_arguments

    read = functools.partial(ArgumentGroupFactory._get_field_docstrings, object.__new__(ArgumentGroupFactory))
    ArgumentGroupFactory._get_field_docstrings = staticmethod(functools.cache(read))
    add_megatron_arguments(argparse.ArgumentParser())

    # How torchrun, in a process of this server, starts its workers.
    subprocess_handler.Popen = forked.Popen  # type: ignore[misc, assignment]

# Otherwise every fork would copy the pages of these objects when it looks for garbage.
gc.freeze()
