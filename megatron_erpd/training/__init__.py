"""Trainings: stage 1, stage 2 and on policy, their steps and what they watch."""
