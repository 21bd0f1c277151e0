"""A process that writes a cache until it is killed: `killed_writer.py FOLDER ROLLOUTS STAGE`, see `STAGES`.

The signal is a real SIGKILL; it is sent from inside, so that it comes at the moment that is meant.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_erpd.data.rollouts import read_rollouts
from megatron_erpd.teacher_cache import finalize as finalize_module  # the function, see below
from megatron_erpd.teacher_cache import parts, prepare_cache
from megatron_erpd.teacher_cache.writer import exclusive

PART_BYTES = 40
"""A few rows to a part."""


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
