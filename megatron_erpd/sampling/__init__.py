"""From a policy and prompts to scored rollouts.

- `prompts`: reading and encoding prompts · `verifiers`: rewards for responses (`verifier_worker` is their process)
- `inputs`: what identifies prompts, verifiers and whatever else a stage reads
- `engine`: what an engine takes and gives, and that of transformers · `vllm`: that of vLLM
- `policy`: Hugging Face folders · `sample`, `score`: the stages, resumable · `parts`: their files, and slices of them
"""
