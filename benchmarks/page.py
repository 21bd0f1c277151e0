"""`docs/performance.md`: an introduction, and a section for each device that has been measured.

A run writes the introduction and its own device's section and keeps the other sections as they are, those of other
benchmarks (`write_section`) too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from benchmarks.records import Figures
from benchmarks.tables import COLUMNS, GROUPS, group_cases, markdown_table, rows
from benchmarks.targets import TARGETS

SECTION = re.compile(r"<!-- begin: (\w+), (.*?) -->\n(.*?)\n<!-- end: \2 -->", re.DOTALL)
"""The kind of the device, its name, and its section."""

LONG = 60
"""A table or list with more lines is folded away."""

QUIET = 0.3
"""More busy processes per core before the run than this disturb it noticeably."""

INTRODUCTION = """# Speed and memory

Of the divergences, and, at the end of the page, of packs of rollouts.

How long does the divergence between a policy and a target take, how much memory, and how much talk between
tensor-parallel ranks? This is measured by

```bash
python benchmarks/divergences.py --docs docs      # on a GPU; --desk: within an hour without one; --quick: two minutes
```

which measures all that is compared in one run, in turns, on the same inputs, makes sure that all compute the same
divergence and gradient, and writes this page. A run on another machine adds a section of its own; those of other
benchmarks stay. `--json FILE` writes every figure, `--help` says more.

## Targets

{targets}

## What is compared

- **ours (plain)**, **ours (Triton)**: `megatron_erpd.vocab_parallel.divergences.divergence` of logits that exist, with
  the passes over them in plain PyTorch or in Triton.
- **ours (fused, ...)**: `megatron_erpd.vocab_parallel.token_terms.fused_token_terms`, which makes the logits from
  hidden states a chunk of tokens at a time, and makes them once more backward instead of keeping them.
- **straightforward**: `log_softmax` of both sides in fp32, `exp`, multiply, sum, and autograd. With several ranks the
  whole rows are gathered first. From hidden states it includes the output layer's products.
- **Megatron topk_kl_div**: what `megatron.training.distillation` trains with; forward KL against a top-k target,
  nothing else. It returns each rank's part of the divergence: the collective that a training step adds isn't counted
  here. It overwrites fp32 logits.
- **Liger JSD**, **Liger fused JSD**: Liger-Kernel's Jensen-Shannon divergence of log-probs, and of hidden states with
  both output layers; one rank only.
- **products (needed)**: the matrix products of the output layers and nothing else: logits, and the gradients of hidden
  states and weights. **products (as ours)**: with the logits made once more backward, as the fused computation does.
- **floor**: what nothing can beat that reads its inputs from memory. It is the time to read and write what has to be
  (inputs once in each direction, the gradient once) at the rate of a large copy, or the time of the needed products at
  the rate of a large one, whichever is longer. Both rates are measured in the same run.

## What the columns mean

- **case**: the divergence; V columns of the vocabulary in all, n tokens, h the width of the hidden states, TP ranks,
  and the type of logits, hidden states and weights. Each rank has V/TP columns of all n tokens.
- **forward**, **forward + backward**: the median of several runs, as a training step does them; of several ranks the
  slowest.
- **of straightforward**, **of floor**: the time of forward + backward in units of those two; less is better.
- **extra memory**: the most that was held at any moment of forward and backward beyond the inputs (logits or hidden
  states and layers, and the target) and the gradient that is returned. Of several ranks the largest. On a CPU it is
  what PyTorch's allocator handed out, exact to the byte; on a GPU what its caching allocator did. **of
  straightforward** beside it is the ratio of these.
- **saved**: what autograd keeps from forward to backward, beyond the inputs.
- **collectives**: calls of a rank, forward / backward. From hidden states with several ranks one of those backward is
  the output layer's own, the sum of the hidden states' gradient.
"""


@dataclass(frozen=True)
class Run:
    """Where, when and how figures were taken.

    Attributes:
        device: `cpu` or `cuda`.
        command: as it was typed.
        busy: load of the machine before the run, in runnable processes per core.
        unavailable: implementations that couldn't run, and why; `skipped` names cases that would not have fitted.
    """

    device: str
    device_name: str
    threads: int
    torch_version: str
    date: str
    command: str
    busy: float
    repeats: int
    unavailable: dict[str, str]
    skipped: list[str]

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.device_name.lower()).strip("-")


def write_page(folder: Path, run: Run, figures: Figures) -> Path:
    """Writes `performance.md` and its plots into `folder`; returns the page's path."""
    from benchmarks.plots import draw  # matplotlib takes seconds

    path = folder / "performance.md"
    before = SECTION.findall(path.read_text(encoding="utf-8")) if path.exists() else []
    images = draw(figures, folder / "images", run.slug)
    sections = {name: (device, body) for device, name, body in before}
    sections[run.device_name] = (run.device, _section(run, figures, images))
    folder.mkdir(parents=True, exist_ok=True)
    targets = _targets({name: device for name, (device, _) in sections.items()})
    texts = [INTRODUCTION.replace("{targets}", targets)]
    texts += [
        f"<!-- begin: {device}, {name} -->\n{body}\n<!-- end: {name} -->\n" for name, (device, body) in sections.items()
    ]
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def write_section(folder: Path, kind: str, name: str, body: str) -> Path:
    """Writes another benchmark's section of `performance.md`, in the place of its former one; returns the path."""
    path = folder / "performance.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    section = f"<!-- begin: {kind}, {name} -->\n{body}\n<!-- end: {name} -->"
    former = next((found[0] for found in SECTION.finditer(text) if found[2] == name), None)
    text = f"{text.rstrip()}\n\n{section}\n".lstrip() if former is None else text.replace(former, section)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _targets(devices: dict[str, str]) -> str:
    """What is aimed at, and where the answer stands."""
    lines = []
    for target in TARGETS:
        places = [name for name, device in devices.items() if target.concerns(device, name)]
        answer = f"see {', '.join(places)}" if places else f"**open**: no {target.device} has been measured"
        lines.append([target.text, answer])
    return markdown_table(("target", "result"), lines, left=2)


def _section(run: Run, figures: Figures, images: dict[str, str]) -> str:
    facts = [
        f"PyTorch {run.torch_version}, {run.threads} thread{'s' * (run.threads != 1)} with TP 1"
        + (", one per rank with more" if run.device == "cpu" else ""),
        f"{run.date}, {run.repeats} run{'s' * (run.repeats != 1)} of each",
        f"`{run.command}`",
    ]
    if run.device == "cpu":
        noisy = ": **the machine was busy, times are noisy**" if run.busy > QUIET else ""
        facts.append(f"load before the run: {run.busy:.1f} busy processes per core{noisy}")
    texts = [f"## {run.device_name}", "\n".join(f"- {fact}" for fact in facts)]
    verdicts = [
        [target.text, target.verdict(figures)] for target in TARGETS if target.concerns(run.device, run.device_name)
    ]
    if verdicts:
        texts.append(markdown_table(("target", "result here"), verdicts, left=2))
    texts += [f"### {title}\n\n{body}" for title, body in _tables(run, figures, images)]
    left_out = [f"- {name}: {reason}" for name, reason in run.unavailable.items()]
    left_out += [f"- {text}" for text in run.skipped]
    if left_out:
        texts.append("### Not measured here\n\n" + _folded("\n".join(left_out), len(left_out), "lines"))
    return "\n\n".join(texts)


def _tables(run: Run, figures: Figures, images: dict[str, str]) -> list[tuple[str, str]]:
    found = []
    for policy, target, title in GROUPS:
        cases = group_cases(figures, policy, target)
        if not cases:
            continue
        lines = rows(figures, cases)
        table = _folded(markdown_table(COLUMNS, lines, left=2), len(lines), "rows")
        name = images.get(f"{policy}-{target}")
        picture = [f"![{title}, {run.device_name}](images/{name})"] if name else []
        found.append((title, "\n\n".join([*picture, table])))
    return found


def _folded(text: str, lines: int, unit: str) -> str:
    if lines <= LONG:
        return text
    return f"<details><summary>{lines} {unit}</summary>\n\n{text}\n\n</details>"
