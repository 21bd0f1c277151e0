from pathlib import Path

import pytest

from megatron_erpd.sampling.policy import Policy, load_policy
from tests.unit.sampling.tiny_model import write_model


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two policies of one architecture: the evaluated one and the base."""
    return tuple(write_model(tmp_path_factory.mktemp(name), seed) for name, seed in (("policy", 3), ("base", 4)))


@pytest.fixture(scope="session")
def policies(folders: tuple[Path, Path]) -> tuple[Policy, Policy]:
    return tuple(load_policy(folder, device="cpu") for folder in folders)
