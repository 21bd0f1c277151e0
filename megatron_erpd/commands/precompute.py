"""The precompute stage: what the policies say about the fixed rollouts, computed once on any layout.

One policy is in memory at a time. Each runs once over the rollouts; where the target q needs several policies, the
hidden states of all but the last are put on disk, and the last one's pass makes q from these and its own. So a rollout
costs a forward pass per policy, whatever is kept of it.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from megatron_erpd.checkpoint.mapping.config import model_flags
from megatron_erpd.commands.sizes import with_size
from megatron_erpd.data.rollouts import Rollouts
from megatron_erpd.errors import RecipeError
from megatron_erpd.evaluation.strength import SelectionResult, read_selection
from megatron_erpd.files import check_output
from megatron_erpd.manifest import input_digest, read_manifest
from megatron_erpd.model.arguments import check_arguments, launched_layout, rank
from megatron_erpd.model.compatible import check_compatible, load_data
from megatron_erpd.model.runtime import (
    PRECOMPUTE_FLAGS,
    check_same_layout,
    initialize,
    prepare_output,
    stage_process,
    untrained_flags,
)
from megatron_erpd.objectives.signals import parse_signal, policies_of
from megatron_erpd.precompute.passes import CachePasses, hidden_dtype
from megatron_erpd.precompute.slices import begin_slice, begin_whole, close_cache, merge_slices, rows_of_slice
from megatron_erpd.recipe.command_line import read_request
from megatron_erpd.recipe.requests import Precompute
from megatron_erpd.settings import AUTO_SIGNAL, Layout, PrecomputeSettings
from megatron_erpd.sources.tokenizer import chat_template_digest
from megatron_erpd.teacher_cache.format import CacheMeta
from megatron_erpd.teacher_cache.rows import check_given_policies
from megatron_erpd.teacher_cache.writer import exclusive


def precompute(argv: list[str]) -> None:
    """`megatron-erpd precompute`, in every process of its layout: a cache, a slice, or the merge of all slices."""
    request = read_request(Precompute, argv)
    check_output(request.output)
    settings, base = request.settings, request.base
    request = request.model_copy(update={"layout": launched_layout(request.layout)})
    pass_through = list(request.megatron)
    policies = {"base": base, **request.policies}
    selection = read_selection(request.selection) if request.selection else None
    resolved = resolve_signal(settings, selection)
    if settings.has_signal or settings.signal == AUTO_SIGNAL:
        check_given_policies(policies_of(parse_signal(resolved.signal)), policies)
    for folder in policies.values():
        read_manifest(folder)
    check_compatible(policies)
    _check_flags(request)
    rollouts = load_data(request.rollouts, base, scored=False)
    request = request if request.merge_slices else with_size(request, rollouts)
    layout = request.layout

    inputs, whole = request.inputs, request.whole.identity
    meta = _cache_meta(resolved, settings.signal, layout, policies, rollouts)
    summary = {} if selection is None else {**selection.figures(), "signal": resolved.signal}
    if request.merge_slices:
        begin_whole(request.output, whole, inputs)
        merge_slices(request.output, meta, rollouts, summary)
        return
    output = request.output
    if request.slice is not None:
        rows = rows_of_slice(request.slice, rollouts.lengths)
        rollouts, output = rollouts.select(rows), begin_slice(output, request.slice, whole, inputs)
    # Two programs on one folder: the second is told at once, before it looks at what the first is writing.
    longest = int(rollouts.lengths.max())
    check_arguments(base / "hf", layout, untrained_flags(PRECOMPUTE_FLAGS), pass_through, longest)
    with exclusive(output) if rank() == 0 else nullcontext(), stage_process() as store:
        check_same_layout(layout)
        prepare_output(output, request.command, request.identity, inputs, request.verify_inputs)
        if selection is not None and rank() == 0:
            print(f"{selection.describe()}\nsignal of this cache: {resolved.signal}", flush=True)
        initialize(base / "hf", layout, PRECOMPUTE_FLAGS, pass_through, longest, store)
        passes = CachePasses(resolved, layout, meta, policies, rollouts, output, request.hidden)
        passes.run()
        close_cache(passes, summary)


def _check_flags(request: Precompute) -> None:
    settings, sliced = request.settings, request.slice is not None or request.merge_slices
    if sliced and settings.has_signal and settings.projection == "global":
        raise RecipeError(
            "--slice: --projection global looks for one eta for all rollouts, which no slice sees; take per_token, or "
            "compute the whole cache in one job"
        )
    if request.hidden is not None and (settings.kind != "topk" or settings.keep_hidden):
        raise RecipeError("--hidden: makes a target q of kept hidden states; take --kind topk without --keep-hidden")


def resolve_signal(settings: PrecomputeSettings, selection: SelectionResult | None) -> PrecomputeSettings:
    """The settings with the selection's recommendation in place of `signal: auto`.

    Raises:
        RecipeError: auto without a selection.
    """
    if settings.signal != AUTO_SIGNAL:
        return settings
    if selection is None:
        raise RecipeError(
            "--signal auto: is decided by the teacher's reward on held-out prompts; give --selection DIR, which "
            "`megatron-erpd select` writes, or name the signal"
        )
    return settings.model_copy(update={"signal": selection.signal})


def _cache_meta(
    settings: PrecomputeSettings, asked: str, layout: Layout, policies: dict[str, Path], rollouts: Rollouts
) -> CacheMeta:
    """What the cache is made from.

    Args:
        settings: with the signal that was chosen.
        asked: the signal that was asked for, which may be `auto`.
    """
    base = policies["base"] / "hf"
    flags = model_flags(base)
    vocab_size = int(flags["vocab_size"])  # type: ignore[call-overload]
    topk, keep = settings.kind == "topk", settings.keep_hidden
    projection = {"mode": settings.projection, "delta": settings.delta, "eta_max": settings.eta_max}
    return CacheMeta(
        kind=settings.kind,
        policies=tuple(policies),
        fingerprints={name: input_digest(folder) for name, folder in policies.items()},
        vocab_size=vocab_size,
        precision=layout.precision,
        tokenizer_digest=rollouts.tokenizer_digest,
        chat_template_digest=chat_template_digest(base),
        # Nothing in a token cache depends on a signal; but a student with `auto` asks which one was chosen.
        signal=settings.signal if topk or asked == AUTO_SIGNAL else None,
        signal_requested=asked if asked == AUTO_SIGNAL else None,
        projection={**projection, "clip": settings.projection_clip} if settings.has_signal else None,
        k=min(settings.k, vocab_size) if topk else None,
        topk_dtype=settings.topk_dtype,
        hidden_size=int(flags["hidden_size"]) if keep else None,  # type: ignore[call-overload]
        hidden_dtype=hidden_dtype(layout) if keep else None,
        rollouts_digest=rollouts.digest(),
    )
