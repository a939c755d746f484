"""A treated folder is read back as what was written, whole or not at all, and by transformers where weights allow."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from transformer_problems import diagnose
from transformer_problems.checkpoints.bundled import bundled
from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.loading import load_subject
from transformer_problems.checkpoints.material import machines_texts
from transformer_problems.checkpoints.record import Step, TreatmentRecord
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.checkpoints.treated import (
    CODES,
    RECORD,
    finish,
    read_record,
    unfinished_folder,
    write_treated,
)
from transformer_problems.clinic.treatment import applied, load_treatment
from transformer_problems.clinic.treatments.rope_scaling import scaled_copy
from transformer_problems.core.errors import ArgumentError, CheckpointError, OutputError

TOKENS = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))
LONG = torch.randint(256, (1, 400), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def draft() -> Subject:
    return load_subject(bundled("draft"))


@pytest.fixture(scope="module")
def rounded(draft: Subject, tmp_path_factory: pytest.TempPathFactory) -> tuple[Subject, Path]:
    """A subject in int8 and its folder."""
    treated = applied(load_treatment("quantization"), Visit(draft, machines_texts())).subject
    folder = tmp_path_factory.mktemp("treated") / "rounded"
    folder.mkdir()
    write_treated(treated, folder)
    return treated, folder


@pytest.fixture
def folder(rounded: tuple[Subject, Path], tmp_path: Path) -> Path:
    """A copy of that folder, to be spoilt."""
    return Path(shutil.copytree(rounded[1], tmp_path / "copy"))


def scaled(subject: Subject, way: str) -> Subject:
    record = TreatmentRecord(subject.name, (Step("rope-scaling", {"way": way}),))
    return replace(scaled_copy(subject, way, 2.0), record=record)


@torch.no_grad()
def logits(subject: Subject, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return subject.run({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}).output


def test_codes_are_read_back_as_they_were_written(rounded: tuple[Subject, Path]) -> None:
    treated, folder = rounded
    again = load_subject(folder)
    assert torch.equal(logits(again), logits(treated))
    assert again.record == treated.record
    assert (again.weight_bytes, again.num_parameters) == (treated.weight_bytes, treated.num_parameters)
    assert again.dtype == treated.dtype


def test_bytes_of_codes_count(rounded: tuple[Subject, Path], draft: Subject) -> None:
    treated, folder = rounded
    header = 8 + int.from_bytes(
        (folder / CODES).read_bytes()[:8], "little"
    )  # a safetensors file begins with its length
    assert treated.weight_bytes == (folder / CODES).stat().st_size - header
    assert treated.weight_bytes < draft.weight_bytes


def test_transformers_alone_refuses_codes(rounded: tuple[Subject, Path]) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(OSError, match="safetensors"):
        AutoModelForCausalLM.from_pretrained(rounded[1], local_files_only=True)


@pytest.mark.parametrize("way", ["linear", "dynamic", "yarn"])
def test_transformers_alone_reads_scaled_positions(way: str, draft: Subject, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    treated = scaled(draft, way)
    write_treated(treated, tmp_path)
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True).eval()
    assert plain.config.rope_parameters["rope_type"] == way
    assert AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)("a b")["input_ids"]
    with torch.no_grad():
        theirs, ours = plain(input_ids=LONG, labels=LONG).loss, treated.losses({"input_ids": LONG}).mean()
        before = draft.losses({"input_ids": LONG}).mean()
    torch.testing.assert_close(theirs.float(), ours)
    assert abs(float(theirs) - float(before)) > 1e-3


def test_a_treated_folder_can_be_diagnosed(rounded: tuple[Subject, Path]) -> None:
    found = diagnose(rounded[1], only=[2, 8, 10, 13, 15])
    assert [finding.severity for finding in found.findings] == ["ok", *["not applicable"] * 4]
    assert all("int8" in finding.meaning for finding in found.findings[1:])


def test_what_was_done_before_stays_in_the_record(rounded: tuple[Subject, Path], tmp_path: Path) -> None:
    again = load_subject(rounded[1])
    assert again.record is not None
    more = replace(again, record=again.record.then(Step("kv-cache", {})))
    write_treated(more, tmp_path)
    assert load_subject(tmp_path).record == more.record
    assert more.record is not None
    assert more.record.source == "draft"


def test_a_subject_without_a_record_is_not_written(draft: Subject, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="no record"):
        write_treated(draft, tmp_path)


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"), unfinished_folder(tmp_path / "out"):
        pass
    with unfinished_folder(tmp_path / "other") as part:
        (tmp_path / "other").mkdir()  # meanwhile
        with pytest.raises(OutputError, match="exists already"):
            finish(part, tmp_path / "other")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["other", "out"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError, OSError(28, "No space left on device")])
def test_what_is_interrupted_leaves_nothing(stop: Any, tmp_path: Path) -> None:
    with (
        pytest.raises(type(stop) if isinstance(stop, Exception) else stop),
        unfinished_folder(tmp_path / "out") as part,
    ):
        (part / "half.safetensors").write_bytes(b"0")
        raise stop
    assert not list(tmp_path.iterdir())


def test_a_whole_folder_gets_its_name(tmp_path: Path) -> None:
    with unfinished_folder(tmp_path / "out") as part:
        (part / "config.json").write_text("{}")
        finish(part, tmp_path / "out")
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "config.json"]


def change_record(folder: Path, **changes: object) -> None:
    file = folder / RECORD
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"format": 2}, "of format 2; known is 1"),
        ({"steps": [{}]}, "is damaged"),
        ({"steps": 3}, "is damaged"),
        ({"steps": [{"solution": "quantization", "settings": {}, "skip": []}]}, "cannot be read as it was treated"),
        ({"steps": [{"solution": "quantization", "settings": {}, "skip": ["none"]}]}, "unknown layer to skip"),
    ],
)
def test_a_damaged_record(changes: dict[str, object], told: str, folder: Path) -> None:
    change_record(folder, **changes)
    with pytest.raises(CheckpointError, match=told) as caught:
        load_subject(folder)
    assert "\n" not in str(caught.value)


def test_missing_or_truncated_codes(folder: Path) -> None:
    (folder / CODES).write_bytes((folder / CODES).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        load_subject(folder)
    (folder / CODES).unlink()
    with pytest.raises(CheckpointError, match=CODES):
        load_subject(folder)


def test_a_file_of_another_program_is_no_record(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    (tmp_path / RECORD).write_text('{"patient": "someone"}')
    assert read_record(tmp_path) is None


def test_a_sentence_encoder_keeps_how_its_states_are_pooled(rounded: tuple[Subject, Path], tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "treated"
    (source / "1_Pooling").mkdir(parents=True)
    folder.mkdir()
    parts = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "../rounded"}]
    (source / "modules.json").write_text(json.dumps(parts))
    (source / "config_sentence_transformers.json").write_text("{}")
    (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    write_treated(replace(rounded[0], folder=source), folder)
    assert json.loads((folder / "1_Pooling" / "config.json").read_text()) == {"pooling_mode_mean_tokens": True}
    assert (folder / "modules.json").is_file()
    assert (folder / "config_sentence_transformers.json").is_file()
    assert not (tmp_path / "rounded").exists()
    (source / "modules.json").write_text("[1]")
    with pytest.raises(OutputError, match="modules.json lists: it is damaged"):
        write_treated(replace(rounded[0], folder=source), folder)


def test_how_a_tokenizer_was_read_is_not_written_down(rounded: tuple[Subject, Path]) -> None:
    settings = json.loads((rounded[1] / "tokenizer_config.json").read_text())
    assert not {"is_local", "local_files_only"} & set(settings)


def test_others_may_read_what_the_user_lets_them_read(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        with unfinished_folder(tmp_path / "new") as folder:
            (folder / "model.safetensors").touch(0o600)
            finish(folder, tmp_path / "new")
    finally:
        os.umask(umask)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "new" / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_full_disk_under_weights_is_one_line(draft: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: File too large")

    monkeypatch.setattr(type(draft.model), "save_pretrained", fails)
    with pytest.raises(OutputError, match=r"^cannot write the treated model into .*File too large\. Free some space"):
        write_treated(scaled(draft, "linear"), tmp_path)


@torch.no_grad()
def test_a_pass_does_not_depend_on_longer_ones_before_it(draft: Subject) -> None:
    """transformers' dynamic RoPE takes its angles back below the trained length alone."""
    subject = scaled(draft, "dynamic")
    at_its_length = LONG[:, :256]
    before = logits(subject, at_its_length)
    logits(subject, LONG)
    assert torch.equal(logits(subject, at_its_length), before)
