"""One healthy model of each kind, trained once for all test processes, and what to examine it on."""

from pathlib import Path

import pytest

from transformer_problems.checkpoints.material import Material, machines_images, machines_texts
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.clinic.ward import admit, patients


@pytest.fixture(scope="session")
def ward_cache(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    folder = tmp_path_factory.getbasetemp()
    return (folder if worker_id == "master" else folder.parent) / "ward"


@pytest.fixture(scope="session")
def causal(ward_cache: Path) -> Subject:
    return admit(patients("causal", 1)[0], ward_cache)


@pytest.fixture(scope="session")
def encoder(ward_cache: Path) -> Subject:
    return admit(patients("encoder", 1)[0], ward_cache)


@pytest.fixture(scope="session")
def vision(ward_cache: Path) -> Subject:
    return admit(patients("image", 1)[0], ward_cache)


@pytest.fixture(scope="session")
def texts() -> Material:
    return machines_texts()


@pytest.fixture(scope="session")
def images() -> Material:
    return machines_images()
