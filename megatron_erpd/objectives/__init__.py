"""The mathematics of ERPD: pure functions on tensors, without Megatron, processes or global state.

- `types`: what losses take and return · `per_token`: sums and counts, ratios, KL estimates
- `advantages`: rewards to advantages · `replay`: losses on fixed rollouts
- `signals`: log-ratios between policies · `projection`: the trust region in closed form
- `divergences`: forward KL, reverse KL, JS on dense rows · `kl_control`: a penalty that meets a budget
"""
