"""Stages as processes on this machine: preflight, start, progress, outcome."""
