"""The commands of `megatron-erpd`: their flags, and what they do with them."""
