"""Evaluation of policies: accuracy on held-out prompts and divergence from the base policy.

- `evaluate`: all figures of several policies, by `responses` (samples and their rewards) and `divergence` (exact, over
  given sequences); `metrics`: the figures and their file; `held_out`: warnings about them
- `selection`: the teacher's checkpoint with the best held-out reward, and by `strength` the signal to distil from it
- `mismatch`: how far sampler and training engine agree about the sampled tokens; `mismatch_verdicts`: what that means
"""
