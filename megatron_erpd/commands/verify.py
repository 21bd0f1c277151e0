"""`megatron-erpd verify`: are artifacts, the rows of teacher caches and converted weights what they should be?"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_erpd.errors import CheckpointError, RecipeError, StageError
from megatron_erpd.manifest import MANIFEST, Manifest, verify_manifest
from megatron_erpd.units import counted, size


def verify(argv: list[str]) -> None:
    """Checks that artifacts are whole: every file there, of the size and content that its manifest recorded; of a
    teacher cache every row besides. With --source, the configuration and every element of every tensor are compared
    with what a checkpoint was imported from, or an export made of, bit for bit; with --prompts the logits too."""
    parser = argparse.ArgumentParser(
        prog="megatron-erpd verify",
        description=verify.__doc__,
        epilog="example: megatron-erpd verify runs/quickstart\n"
        "         megatron-erpd verify runs/mine/base --source Qwen3-4B --prompts prompts.jsonl\n"
        "         megatron-erpd verify exported/student --source runs/mine/round-01/student",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("folder", type=Path, nargs="+", help="an artifact, or a folder that holds artifacts (a run)")
    parser.add_argument("--rollouts", type=Path, help="teacher caches must be of exactly these rollouts")
    parser.add_argument(
        "--source",
        type=Path,
        metavar="PATH",
        help="compare the weights of the one folder with these: a checkpoint's with a Hugging Face folder, a Hugging "
        "Face folder's with a checkpoint (an artifact, or ARTIFACT@ITERATION)",
    )
    parser.add_argument(
        "--prompts",
        help="with --source: run these through Megatron and transformers, in fp32 in this process, and compare the "
        "logits; JSON lines with prompt, or reasoning-gym:TASK?size=4",
    )
    given = parser.parse_args(argv)
    if given.source is not None:
        if len(given.folder) != 1:
            raise RecipeError(f"--source {given.source}: is compared with one folder, {len(given.folder)} were given")
        _verify_weights(given.folder[0], given.source, given.prompts)
        return
    if given.prompts is not None:
        raise RecipeError(f"--prompts {given.prompts}: logits are compared with --source only; give it too")
    rollouts = None
    if given.rollouts is not None:
        from megatron_erpd.data.rollouts import read_rollouts

        rollouts = read_rollouts(given.rollouts)
    problems: list[str] = []
    whole: list[Manifest] = []
    for folder in given.folder:
        artifacts = sorted(path.parent for path in folder.rglob(MANIFEST))
        if not artifacts:
            problems.append(f"{folder}: holds no artifact; give a folder that a stage wrote")
        for artifact in artifacts:
            try:
                manifest = verify_manifest(artifact)
            except StageError as error:
                problems.append(str(error))
                continue
            # The slices of a cache are checked as parts of the whole.
            is_cache = manifest.stage == "precompute" and artifact.parent not in artifacts
            found = _verify_cache(artifact, rollouts) if is_cache else []
            problems += found
            if not found:
                whole.append(manifest)
                print(f"{artifact}: {manifest.stage}, {len(manifest.files)} files, whole")
    if problems:
        raise StageError("\n".join(problems))
    files = [file for manifest in whole for file in manifest.files.values()]
    held = f"{counted(len(files), 'file')}, {size(sum(file['size'] for file in files))}"
    print(f"{counted(len(whole), 'artifact')}, all whole: {held}")


def _verify_weights(folder: Path, source: Path, prompts: str | None) -> None:
    from megatron_erpd.checkpoint.compare import compare_pair, find_pair
    from megatron_erpd.errors import raise_problems

    pair = find_pair(folder, source)
    artifact = next((p for p in (folder, *folder.parents) if (p / MANIFEST).is_file()), None)
    with _progress("comparing") as advance:
        found = compare_pair(pair, advance)
    print(f"{pair.iteration} and {pair.hf_folder}: compared {found.describe()}", flush=True)
    for note in found.notes:
        print(f"note: {note}", flush=True)
    if found.compared.differences:
        raise_problems("they differ", found.compared.differences)
    print("equal, bit for bit", flush=True)
    if artifact is not None:
        verify_manifest(artifact)
        print(f"{artifact}: as its manifest recorded it", flush=True)
    if prompts is not None:
        _verify_logits(pair, prompts)


def _verify_logits(pair: Any, prompts: str) -> None:
    from megatron_erpd.model.logits import LOGIT_TOLERANCE, compare_on_prompts
    from megatron_erpd.sampling.prompts import encode_prompts, load_prompts
    from megatron_erpd.sources.tokenizer import load_tokenizer

    encoded = encode_prompts(load_tokenizer(pair.hf_folder), load_prompts(prompts))
    found = compare_on_prompts(pair, encoded)
    worst = max(found, key=lambda comparison: comparison.relative_difference)
    tokens = sum(map(len, encoded))
    print(
        f"logits of {len(found)} prompts, {tokens} tokens, Megatron against transformers: they differ by at most "
        f"{worst.relative_difference:.1e} of the largest logit; the likeliest token is the same at "
        f"{sum(c.argmax_agreement * len(e) for c, e in zip(found, encoded, strict=True)) / tokens:.1%} of them",
        flush=True,
    )
    if not worst.agrees():
        raise CheckpointError(f"the logits differ by more than {LOGIT_TOLERANCE:g} of the largest one")


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what)
        yield lambda done, total: progress.update(task, completed=done, total=max(total, 1))


def _verify_cache(folder: Path, rollouts: Any) -> list[str]:
    from megatron_erpd.teacher_cache.verify import verify_cache

    with _progress(f"rows of {folder.name}") as advance:
        return verify_cache(folder, rollouts, advance)
