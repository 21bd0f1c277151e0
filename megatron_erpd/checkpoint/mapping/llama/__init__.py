"""Llama and its relatives: Mistral, Qwen2, Qwen3, and mixtures of experts built of the same parts."""
