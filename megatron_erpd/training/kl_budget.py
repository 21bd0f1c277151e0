"""The KL controller inside a training run: measured once per step over all ranks, and kept across a resume."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_erpd.errors import StageError
from megatron_erpd.files import json_line
from megatron_erpd.objectives.kl_control import KlController
from megatron_erpd.progress import keep_before, read_json_lines


class KlBudget:
    """Moves the KL coefficient once per optimizer step (a `Watcher`), on last pipeline stages.

    All ranks get the same mean, and so hold the same coefficient. Its state after every step goes to a JSON-lines file,
    from which a resumed run takes it.

    Args:
        controller: where it starts.
        history: file of the states; written by the rank for which `writes` is true.
    """

    def __init__(
        self,
        controller: KlController,
        history: Path,
        writes: bool,
    ) -> None:
        self.controller = controller
        self.history = history
        self.writes = writes
        self.iteration = 0

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

    def after_step(self, means: Mapping[str, float]) -> None:
        """Moves the coefficient by the step's `policy_base_kl`."""
        self.controller.update(means["policy_base_kl"])
        self.iteration += 1
        if self.writes:
            with self.history.open("a") as file:
                file.write(json_line({"iteration": self.iteration, "state": self.controller.state_dict()}))
