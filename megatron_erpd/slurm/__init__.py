"""The stages of a run as jobs of SLURM."""
