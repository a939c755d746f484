"""What makes results incomparable changes their key; nothing else does."""

import os
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from transformer_problems.core.records import Environment
from transformer_problems.lab import fingerprint
from transformer_problems.lab.fingerprint import code_fingerprint, folder_fingerprint, hash_files, run_fingerprint
from transformer_problems.lab.runner import Run, RunRequest
from transformer_problems.lab.store import Store
from transformer_problems.problems import experiment_of

ROOM = "p02_no_positional_awareness"
HERE = Environment("0.1.0", "", "3.11.7", "2.13.0", "Linux x86_64", "a CPU", "cpu", 2, "float32", "2025-01-31")


def test_the_key_follows_code_device_machine_versions_threads_and_text() -> None:
    keys = {run_fingerprint(ROOM, replace(HERE, date="2025-02-01", revision="any"), "text")}
    assert keys == {run_fingerprint(ROOM, HERE, "text")}
    assert keys.pop().startswith(f"{code_fingerprint(ROOM)}-cpu-")
    changed = {"processor": "another CPU", "threads": 4, "torch": "2.14.0", "python": "3.12.0", "device": "cuda"}
    assert set(changed) <= {field.name for field in fields(Environment)}
    keys = {run_fingerprint(ROOM, replace(HERE, **{name: value}), "text") for name, value in changed.items()}
    keys |= {run_fingerprint(ROOM, HERE, "another text"), run_fingerprint(ROOM, HERE, "text")}
    assert len(keys) == len(changed) + 2


def test_another_number_of_threads_measures_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = RunRequest({2: ROOM}, experiment_of, "quick", "cpu", tmp_path)
    with Store.open(request.store_path) as store:
        first = Run(request, store)
        for cell in first.planned:
            store.finish(cell, replace(HERE, revision=first.fingerprints[2]), [], 1.0)
        assert Run(request, store).pending == []
        monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
        assert Run(request, store).pending == first.planned


def test_a_hash_holds_paths_and_contents_and_their_border(tmp_path: Path) -> None:
    def hash_of(**files: str) -> str:
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        return hash_files((name, tmp_path / name) for name in files)

    hashes = [
        hash_of(a="1", b="2"),
        hash_of(a="1", c="2"),
        hash_of(a="2", b="1"),
        hash_of(a="12", b=""),
        hash_of(a="12"),
    ]
    assert len(set(hashes)) == len(hashes)
    assert hash_of(a="1", b="2") == hashes[0]


def test_sources_of_every_kind_count_by_their_path_and_caches_do_not(tmp_path: Path) -> None:
    for name in ("scan.cpp", "inner/scan.cpp", "data.toml", "__pycache__/scan.pyc"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [path for path, _ in fingerprint._files(tmp_path, "kernels")]
    assert found == ["kernels/data.toml", "kernels/inner/scan.cpp", "kernels/scan.cpp"]


def test_a_folders_key_follows_names_sizes_and_last_changes(tmp_path: Path) -> None:
    file = tmp_path / "inner" / "a.wav"
    file.parent.mkdir()
    file.write_bytes(b"1234")
    os.utime(file, ns=(0, 10**18))
    keys = [folder_fingerprint(tmp_path)]
    assert folder_fingerprint(tmp_path) == keys[0]
    file.write_bytes(b"5678")
    os.utime(file, ns=(0, 10**18 + 1_000))
    keys.append(folder_fingerprint(tmp_path))
    file.write_bytes(b"56789")
    os.utime(file, ns=(0, 10**18 + 1_000))
    keys.append(folder_fingerprint(tmp_path))
    file.rename(file.with_name("b.wav"))
    keys.append(folder_fingerprint(tmp_path))
    assert len(set(keys)) == 4
