"""Rollouts on disk and in batches.

- `schema`: the columns of a rollout and their checks · `rollouts`: reading, writing and counting files of them
- `rewards`: rewards apart from the rollouts · `rollout_warnings`: what a training will learn little from
- `replay_dataset`: the order of the batches · `batch`: collation, and the micro-batches of a rank ahead of need
"""
