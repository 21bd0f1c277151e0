"""The only package that imports `megatron.training`: models, batches, forward steps and the stages that run them."""
