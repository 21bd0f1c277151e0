"""`megatron-erpd verify`: are artifacts, and the rows of teacher caches, what was written?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_erpd.errors import StageError
from megatron_erpd.manifest import MANIFEST, verify_manifest


def verify(argv: list[str]) -> None:
    """Checks that artifacts are whole: every file there, of the size and content that its manifest recorded; of a
    teacher cache every row besides."""
    parser = argparse.ArgumentParser(
        prog="megatron-erpd verify",
        description=verify.__doc__,
        epilog="example: megatron-erpd verify runs/quickstart",
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("folder", type=Path, nargs="+", help="an artifact, or a folder that holds artifacts (a run)")
    parser.add_argument("--rollouts", type=Path, help="teacher caches must be of exactly these rollouts")
    given = parser.parse_args(argv)
    rollouts = None
    if given.rollouts is not None:
        from megatron_erpd.data.rollouts import read_rollouts

        rollouts = read_rollouts(given.rollouts)
    problems: list[str] = []
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
                print(f"{artifact}: {manifest.stage}, {len(manifest.files)} files, whole")
    if problems:
        raise StageError("\n".join(problems))


def _verify_cache(folder: Path, rollouts: Any) -> list[str]:
    from rich.console import Console
    from rich.progress import Progress

    from megatron_erpd.teacher_cache.verify import verify_cache

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"rows of {folder.name}")
        return verify_cache(
            folder, rollouts, lambda done, total: progress.update(task, completed=done, total=max(total, 1))
        )
