"""What the server of `tests/forked.py` imports once, for all processes that are forked from it."""

import gc
import importlib

from megatron_erpd import platform

# On a GPU, processes import what they need: a process can't be forked from one that has used CUDA.
if platform.enable_cpu():
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.models.qwen3 import modeling_qwen3  # noqa: F401

    from megatron_erpd.commands import cli

    for command in cli.COMMANDS.values():
        importlib.import_module(command.module)

# Otherwise every fork would copy the pages of these objects when it looks for garbage.
gc.freeze()
