"""What users bring: prompts, rollouts of other programs, conversations and tokenizers, read and checked."""
