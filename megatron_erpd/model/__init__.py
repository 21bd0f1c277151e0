"""Megatron's models, their arguments and heads, and what every stage that runs one shares."""
