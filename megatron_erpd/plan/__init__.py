"""What a run will need: memory, GPUs, time and disk. Nothing is built or loaded."""
