"""From a policy and prompts to scored rollouts.

- `prompts`: reading and encoding prompts · `verifiers`: rewards for responses (`verifier_worker` is their process)
- `task`: what identifies prompts and verifier · `inputs`: digests of what stages read
- `engine`: sampling with transformers · `vllm`: the same with vLLM · `types`: what both take and give
- `policy`: Hugging Face folders · `sample`: the whole stage, resumable · `parts`: its files, and slices of them
"""
