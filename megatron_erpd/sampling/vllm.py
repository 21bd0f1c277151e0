"""Sampling with vLLM, through its public offline interface (`vllm.LLM`, `vllm.SamplingParams`).

vLLM is imported when an engine is made, never before. It needs a GPU machine and is an extra of the package.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_erpd.errors import RecipeError
from megatron_erpd.model_folder import read_tensors
from megatron_erpd.progress import OnProgress
from megatron_erpd.sampling.engine import SampledResponse
from megatron_erpd.sources.tokenizer import check_end


class VllmEngine:
    """A `SamplingEngine` over vLLM.

    The log-probs are vLLM's `processed_logprobs`: those of the distribution drawn from, after temperature and `top_p`.
    A prompt's noise comes from a seed of its own, made of `seed` and its index. vLLM batches as it sees fit, and its
    kernels round differently in different batches: a response can differ from run to run where two tokens are
    nearly tied.

    Args:
        hf_path: a Hugging Face folder.
        dtype: of the weights, in vLLM's words; `auto` is that of the checkpoint.
        tensor_parallel_size: GPUs over which every layer is split.
    """

    def __init__(
        self,
        hf_path: str | Path,
        dtype: str = "auto",
        tensor_parallel_size: int = 1,
    ) -> None:
        try:
            import vllm
        except ImportError as error:
            raise RecipeError(
                "engine 'vllm' needs vLLM, which isn't installed here: pip install 'megatron-erpd[vllm]', "
                "or use engine 'transformers'"
            ) from error
        read_tensors(hf_path)
        check_end(hf_path)
        self._sampling_params = vllm.SamplingParams
        self._llm = vllm.LLM(
            model=str(hf_path),
            dtype=dtype,
            tensor_parallel_size=tensor_parallel_size,
            gpu_memory_utilization=0.9,
            logprobs_mode="processed_logprobs",
            # By default vLLM prefers Mistral's own format of the weights where it is there, which nothing else reads.
            config_format="hf",
            load_format="safetensors",
        )

    def sample(
        self,
        prompt_token_ids: Sequence[Sequence[int]],
        *,
        num_samples: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 512,
        prompt_indices: Sequence[int] | None = None,
        progress: OnProgress | None = None,
    ) -> list[list[SampledResponse]]:
        """See `SamplingEngine.sample`. `batch_size` has no effect: vLLM schedules by the memory that it has."""
        indices = range(len(prompt_token_ids)) if prompt_indices is None else prompt_indices
        parameters = [
            self._sampling_params(
                n=num_samples,
                temperature=temperature,
                top_p=top_p,
                max_tokens=max_new_tokens,
                logprobs=0,  # no alternatives: the drawn token's own log-prob is always there
                seed=prompt_seed(seed, index),
            )
            for index in indices
        ]
        prompts = [{"prompt_token_ids": [int(token) for token in prompt]} for prompt in prompt_token_ids]
        bar = False if progress is None else _bar(progress, len(prompts) * num_samples)
        outputs = self._llm.generate(prompts, parameters, use_tqdm=bar)
        results = [[as_sample(completion) for completion in output.outputs] for output in outputs]
        if progress is not None:
            progress(len(prompts) * num_samples, len(prompts) * num_samples)
        return results


def _bar(progress: OnProgress, total: int) -> type:
    """What vLLM makes its progress bars with: prints nothing, and tells of the responses of finished prompts. Long
    responses take long, and a job whose stage says nothing for `slurm.hang_minutes` is ended."""
    from tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **{**named, "file": io.StringIO()})

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            if self.iterable is None:  # the other bar is for handing the prompts over
                progress(min(int(self.n), total), total)
            return shown

    return Bar


def prompt_seed(seed: int, index: int) -> int:
    """A seed in [0, 2^31) for one prompt; vLLM adds the sample's number to it."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0]) >> 1


def as_sample(completion: Any) -> SampledResponse:
    """One `vllm.CompletionOutput`: `token_ids` (its stop token included), `logprobs` (one dict per token), reason.

    Raises:
        RecipeError: vLLM gave up on the request, or left the log-probs out.
    """
    tokens = list(completion.token_ids)
    if completion.finish_reason not in ("stop", "length"):
        raise RecipeError(
            f"vLLM ended a response with {completion.finish_reason!r}; lower max_new_tokens or check its log"
        )
    if completion.logprobs is None or len(completion.logprobs) != len(tokens):
        raise RecipeError("vLLM returned no log-prob for some tokens; is this version older than 0.10?")
    log_probs = [entry[token].logprob for entry, token in zip(completion.logprobs, tokens, strict=True)]
    return SampledResponse(
        np.array(tokens, dtype=np.int64), np.array(log_probs, dtype=np.float32), completion.finish_reason
    )
