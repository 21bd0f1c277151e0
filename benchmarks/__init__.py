"""Measurements of speed and memory; `python benchmarks/divergences.py --help` tells how to run them."""
