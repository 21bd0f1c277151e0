"""Recipes, the stages that they mean, and which of their artifacts are there already."""
