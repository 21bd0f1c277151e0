"""The KL controller inside a training run: measured once per step over all ranks, and kept across a resume."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from megatron_erpd.errors import StageError
from megatron_erpd.objectives.kl_control import KlController
from megatron_erpd.training.metrics import keep_before, read_json_lines


class KlBudget:
    """Moves the KL coefficient once per optimizer step.

    `measure` is called per micro-batch on last pipeline stages. With the step's last micro-batch the sums are added
    up over the data-parallel group (one all-reduce of two numbers, which every rank of the last stage joins), so all
    ranks hold the same coefficient. Its state after every step goes to a JSON-lines file, from which a resumed run
    takes it.

    Args:
        controller: where it starts.
        num_micro_batches: micro-batches of one rank in one step.
        group: data-parallel group, with context parallelism.
        history: file of the states; written by the rank for which `writes` is true.
    """

    def __init__(
        self,
        controller: KlController,
        num_micro_batches: int,
        group: torch.distributed.ProcessGroup | None,
        history: Path,
        writes: bool,
    ) -> None:
        self.controller = controller
        self.num_micro_batches = num_micro_batches
        self.group = group
        self.history = history
        self.writes = writes
        self.iteration = 0
        self._measured: list[Tensor] = []

    @property
    def coefficient(self) -> float:
        return self.controller.coefficient

    def resume(self, iteration: int) -> None:
        """Takes up the state after `iteration` steps; 0 starts afresh.

        Raises:
            StageError: the history lacks that iteration.
        """
        self.iteration = iteration
        if iteration:
            states = {row["iteration"]: row for row in read_json_lines(self.history)}
            if iteration not in states:
                raise StageError(
                    f"{self.history}: has no state of the KL controller after iteration {iteration}, so the run "
                    "can't be continued as it was; delete the stage's folder to start it anew"
                )
            self.controller.load_state_dict(states[iteration]["state"])
        if self.writes:
            keep_before(self.history, iteration + 1)

    def measure(self, kl_sum: Tensor, num_tokens: Tensor) -> None:
        """Adds a micro-batch's KL; the last one of a step moves the coefficient."""
        self._measured.append(torch.stack([kl_sum.detach().double(), num_tokens.double()]))
        if len(self._measured) < self.num_micro_batches:
            return
        total = torch.stack(self._measured).sum(dim=0)
        self._measured = []
        if self.group is not None:
            torch.distributed.all_reduce(total, group=self.group)
        self.controller.update(float(total[0] / total[1].clamp(min=1)))
        self.iteration += 1
        if self.writes:
            with self.history.open("a") as file:
                file.write(json.dumps({"iteration": self.iteration, "state": self.controller.state_dict()}) + "\n")
