from pathlib import Path

import pytest

from megatron_erpd.sampling.policy import Policy, load_policy
from tests.unit.sampling.tiny_model import write_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("policy"), seed=3)


@pytest.fixture(scope="session")
def policy(model_folder: Path) -> Policy:
    return load_policy(model_folder, device="cpu")
