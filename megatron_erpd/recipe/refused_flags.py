"""The keys of a recipe that give Megatron flags which are refused (`settings.megatron_flags`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_erpd.recipe.recipe import Recipe
from megatron_erpd.recipe.stages import Stage, flag_name
from megatron_erpd.settings.megatron_flags import refused_flags


def refused_keys(recipe: Recipe, stages: Sequence[Stage]) -> list[str]:
    """A line for each key: where it stands, why it is refused, and which stages it is for.

    Args:
        stages: of the recipe. Those of later rounds differ by their data alone and are not named.
    """
    names: dict[str, list[str]] = {}
    for stage in stages:
        if stage.name.startswith("round-"):
            continue
        own = _keys("megatron", recipe.megatron)
        if stage.name in recipe.stages:
            own |= _keys(f"stages.{stage.name}.megatron", recipe.stages[stage.name].megatron)
        for flag, reason in refused_flags(stage.megatron).items():
            names.setdefault(f"{own[flag]}: {reason}", []).append(stage.name)
    return [f"{problem} (for {', '.join(found)})" for problem, found in names.items()]


def _keys(section: str, given: Iterable[str]) -> dict[str, str]:
    """Flags to the keys that give them."""
    return {flag_name(key): f"{section}.{key}" for key in given}
