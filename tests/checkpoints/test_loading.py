"""A checkpoint is loaded whole, or refused in one line before anything of it is."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from transformer_problems.checkpoints import loading
from transformer_problems.checkpoints.bundled import bundled, load_bundled
from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.loading import load_subject, subject_of
from transformer_problems.checkpoints.material import machines_texts
from transformer_problems.clinic.diagnose import begin
from transformer_problems.core.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to be spoilt."""
    return Path(shutil.copytree(bundled("draft"), tmp_path / "checkpoint"))


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refusal(folder: Path | str, **options: bool) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_subject(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_loaded_model_gives_what_this_packages_own_reader_gives() -> None:
    subject = load_subject(bundled("draft"))
    assert (subject.kind, subject.name, subject.trained_len, subject.hard_limit) == ("causal", "draft", 256, None)
    tokens = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = load_bundled("draft", dtype=torch.float32)(tokens)
        theirs = subject.with_model(subject.model.float()).run({"input_ids": tokens}).output
    torch.testing.assert_close(ours, theirs)


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\xff"])
def test_a_damaged_config(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content, encoding="latin-1")
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architectures": ["MindReader"], "model_type": "mind"}, "unknown architecture (MindReader)"),
        ({"architectures": None, "model_type": "mind"}, "unknown architecture"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "encoder with a decoder"),
        ({"architectures": ["WhisperForAudioClassification"], "model_type": "whisper"}, "no check-ups for"),
        ({"architectures": ["Own"], "auto_map": {"AutoModel": "own.Own"}}, "code of its own"),
    ],
)
def test_another_kind(folder: Path, changes: dict[str, object], told: str) -> None:
    change_config(folder, **changes)
    message = refusal(folder)
    assert told in message
    assert "Supported are" in message


def test_code_beside_a_checkpoint_is_never_run(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(trace)!r}, 'w')")
    change_config(folder, auto_map={"AutoModelForCausalLM": "own.Own"})
    load_subject(folder)  # its architecture is known, so that the code is not needed
    assert not trace.exists()


def test_truncated_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert "truncated" in refusal(folder)


def test_weights_that_are_missing(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    assert "model.layers.0.mlp.up_proj.weight" in refusal(folder)


def test_weights_of_another_shape(folder: Path) -> None:
    change_config(folder, intermediate_size=8)
    told = refusal(folder)
    assert "mlp.down_proj.weight of shape" in told
    assert "asks for [" in told


def test_a_config_of_fewer_layers_than_the_weights(folder: Path) -> None:
    change_config(folder, num_hidden_layers=1)
    told = refusal(folder)
    assert "more layers than its config.json names" in told
    assert "layers.1." in told


def test_left_over_weights_that_are_no_layer_are_let_go(folder: Path) -> None:
    file = folder / "model.safetensors"
    further = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "score.weight": torch.ones(2, 4)}
    save_file({**load_file(file), **further}, file, metadata={"format": "pt"})
    assert load_subject(folder).kind == "causal"


def test_why_a_config_is_refused_is_told(folder: Path) -> None:
    change_config(folder, hidden_size="wide")
    assert "expected int" in refusal(folder)


def test_weights_that_are_not_finite(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    assert "not finite (model.norm.weight)" in refusal(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no weights" in refusal(folder)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, (str(self.trace), "w"))


@pytest.mark.parametrize("allowed", [False, True])
def test_a_malicious_pickle_is_not_run(folder: Path, tmp_path: Path, allowed: bool) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    message = refusal(folder, allow_pickle=allowed)
    assert ("cannot be loaded" if allowed else "--allow-pickle") in message
    assert not (tmp_path / "ran").exists()


def test_a_pickle_of_plain_tensors_is_read_where_the_user_says_so(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    loaded = load_subject(folder, allow_pickle=True).model.state_dict()
    assert torch.equal(loaded["model.norm.weight"], weights["model.norm.weight"])


def test_an_index_that_names_what_is_missing_or_elsewhere(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert "lacks model-1.safetensors" in refusal(folder)
    (folder.parent / "other.safetensors").write_bytes(b"")
    index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    assert "outside its folder" in refusal(folder)
    index.write_text("{}")
    assert "damaged" in refusal(folder)


def test_a_model_larger_than_memory_is_told_before_loading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Machine:
        @staticmethod
        def virtual_memory() -> object:
            return type("Memory", (), {"available": 1_000})

    real = loading.require
    monkeypatch.setattr(
        loading, "require", lambda name, extra: Machine if name == "psutil" else real(name, extra=extra)
    )
    monkeypatch.setattr(loading, "_load_model", lambda *_: pytest.fail("loaded"))
    assert "GB are free" in refusal(folder)


def test_a_missing_tokenizer(folder: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for file in folder.glob("tokenizer*"):
        shutil.move(file, tokenizer)
    assert "--tokenizer" in refusal(folder)
    assert load_subject(folder, tokenizer=tokenizer).tokenizer("a")["input_ids"] == [97]


def test_names_that_are_no_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert "is a file" in refusal(file)
    assert "it is empty" in refusal("")
    for name in ("./no/such/folder", "/no/such", "a b", "a/b/c"):
        assert "there is no" in refusal(name)


def test_an_id_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "could not be had as an id" in refusal("nobody/nothing-of-this-name")


def test_an_id_keeps_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder in the cache is called by a revision."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(folder))
    assert load_subject("somebody/draft").name == "somebody/draft"


@pytest.mark.parametrize("name", ["DeiTForImageClassification", "DeiTForImageClassificationWithTeacher", "DeiTModel"])
def test_each_form_of_an_image_model_is_loaded_as_itself(name: str, tmp_path: Path) -> None:
    import transformers

    config = transformers.DeiTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    getattr(transformers, name)(config).save_pretrained(tmp_path)
    assert type(load_subject(tmp_path).model).__name__ == name


def test_float16_on_a_cpu_is_examined_in_float32_and_told(folder: Path) -> None:
    weights = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    subject = load_subject(folder)
    assert subject.dtype == torch.float32
    loaded = subject.model.state_dict()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in weights.items())
    told = begin(Visit(subject, machines_texts())).caution
    assert told is not None
    assert "stored in float16" in told
    with pytest.raises(CheckpointError, match=r"model.float\(\)"):
        subject_of(subject.model.half(), subject.tokenizer)


def test_a_model_in_memory() -> None:
    subject = load_subject(bundled("draft"))
    again = subject_of(subject.model, subject.tokenizer, name="mine")
    assert (again.name, again.kind) == ("mine", "causal")
    with pytest.raises(CheckpointError, match="tokenizer must be given"):
        subject_of(subject.model)
    with pytest.raises(CheckpointError, match=r"tokenizer must be one of transformers; got str"):
        subject_of(subject.model, "draft")
    with pytest.raises(CheckpointError, match="model of transformers"):
        subject_of(torch.nn.Linear(2, 2))
