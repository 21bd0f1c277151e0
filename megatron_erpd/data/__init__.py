"""Rollouts on disk and in batches: schema, files, replay order, collation."""

from megatron_erpd.data.batch import Batch, collate, gather_response_rows, scatter_response_rows
from megatron_erpd.data.replay_dataset import BatchOrder
from megatron_erpd.data.rollouts import Rollouts, read_rollouts, validate_against_vocabulary, write_rollouts
from megatron_erpd.data.schema import Rollout, sample_id

__all__ = [
    "Batch",
    "BatchOrder",
    "Rollout",
    "Rollouts",
    "collate",
    "gather_response_rows",
    "read_rollouts",
    "sample_id",
    "scatter_response_rows",
    "validate_against_vocabulary",
    "write_rollouts",
]
