"""What a policy is worth and how far it went: accuracy on held-out prompts and divergence from the base policy.

- `divergence`: exact divergences of two policies over given sequences
- `metrics`: the figures and their file · `evaluate`: measuring all of them, for several policies
- `mismatch`: whether sampler and training engine agree about the sampled tokens
"""
