"""Stages as processes of this machine: checked before, started, watched, judged when they end."""
