"""Recipes, the stages that they mean, and running them on this machine."""
