"""Fixtures of several test files, and `--corrupt`: a kernel that is slightly wrong, which the tests have to notice."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from corruption import CORRUPTIONS, corrupt

from negotiator_kernels import exponentials, fused


def pytest_configure() -> None:
    """Without a GPU Triton kernels are interpreted, which is decided when triton is imported."""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--corrupt", choices=sorted(CORRUPTIONS), help="run the tests with every loss kernel wrong so")


@pytest.fixture(autouse=True)
def corrupted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if (name := request.config.getoption("--corrupt")) is not None:
        corrupt(name, monkeypatch)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 5 rows and tiles of 40 columns at V = 101 in fp64, so that every test crosses their borders."""
    monkeypatch.setitem(fused.CHUNK_BYTES, "cpu", 5 * 101 * 8)
    monkeypatch.setattr(exponentials, "TILE_STEP", 8)
    monkeypatch.setitem(exponentials.TILE_BYTES, "cpu", 5 * 40 * 4)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_run import write_model  # few tests need it, and its imports take long

    folder = tmp_path_factory.mktemp("tiny-model")
    write_model(folder)
    return folder


@pytest.fixture(scope="session")
def config_file(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run of seconds, on the tiny model."""
    from tiny_run import write_config

    file = tmp_path_factory.mktemp("tiny-config") / "tiny.yaml"
    write_config(file, tiny_model)
    return file
