"""The bundled pair: small, of one tokenizer, as good as their cards say, and made by the script."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
import torch

from transformer_problems.checkpoints.bundled import BundledName, bundled, load_bundled
from transformer_problems.core.errors import UnknownNameError
from transformer_problems.lab.data.text import load_text
from transformer_problems.models.llama import load_llama

NAMES = get_args(BundledName)
TEXT = 'import os\n\n\ndef héllo(name: str) -> None:\n    """Ā naïve \'test\' — 日本"""\n\t'


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "train_checkpoints.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def card_figure(name: str, row: str) -> float:
    return float(re.search(rf"^\| {row} \| ([\d.]+)", (bundled(name) / "README.md").read_text(), re.MULTILINE)[1])


def test_the_pair_fits_into_twelve_megabytes() -> None:
    sizes = {name: sum(file.stat().st_size for file in bundled(name).iterdir()) for name in NAMES}
    assert sum(sizes.values()) <= 12_000_000
    assert sizes["draft"] < sizes["base"] / 4


def test_both_have_the_same_tokenizer_and_vocabulary() -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (bundled("base") / file).read_bytes() == (bundled("draft") / file).read_bytes()
    assert load_bundled("base").config.vocab_size == load_bundled("draft").config.vocab_size == 257


@pytest.mark.parametrize("name", NAMES)
def test_it_continues_a_text(name: BundledName) -> None:
    model = load_bundled(name, dtype=torch.float32)
    prompt = torch.tensor([list(b"import os\nimport sys\n\n\nclass Parser:\n    def __ini")])
    with torch.no_grad():
        logits, state = model.stream(prompt, model.initial_state(1))
        written = []
        for _ in range(8):
            written.append(logits[0, -1].argmax().item())
            logits, state = model.stream(torch.tensor([written[-1:]]), state)
    assert bytes(written).startswith(b"t__(self")


@pytest.mark.parametrize("name", NAMES)
def test_the_held_out_score_is_what_the_card_says(name: BundledName, script: ModuleType) -> None:
    model = load_bundled(name, dtype=torch.float32)
    score, error = script.held_out_score(model, load_text().test, 48)
    card = card_figure(name, "Held-out score")
    assert 0.5 < card < 3.0
    # three standard errors of this small sample: other windows, and in other versions of Python other text
    assert abs(score - card) < 3 * error


def test_the_draft_is_worse_than_the_base() -> None:
    assert card_figure("draft", "Held-out score") > card_figure("base", "Held-out score")


@pytest.mark.peer
@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_model_and_tokenizer(name: BundledName) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundled(name))
    tokens = tokenizer(TEXT).input_ids
    assert tokens == list(TEXT.encode())
    assert tokenizer.decode(tokens) == TEXT
    assert len(tokenizer) == 257
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 256
    peer = AutoModelForCausalLM.from_pretrained(bundled(name), dtype=torch.float32)
    batch = torch.tensor([tokens])
    # float32 sums of some hundred terms through up to eight layers, in another order
    torch.testing.assert_close(load_bundled(name, dtype=torch.float32)(batch), peer(batch).logits, atol=1e-3, rtol=1e-4)


def test_unknown_names_list_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="unknown bundled checkpoint 'drift'. Nearest: draft"):
        bundled("drift")
    with pytest.raises(UnknownNameError, match="unknown bundled checkpoint 'gpt2'. Known: base, draft.$"):
        load_bundled("gpt2")  # type: ignore[arg-type]


def test_the_script_makes_whole_folders_again_from_the_same_seed(script: ModuleType, tmp_path: Path) -> None:
    for run in ("one", "two"):
        script.main(["--steps", "2", "--windows", "2", "--out", str(tmp_path / run)])
    for name in NAMES:
        files = {file.name for file in (tmp_path / "one" / name).iterdir()}
        assert files == {file.name for file in bundled(name).iterdir()}
        weights = [(tmp_path / run / name / "model.safetensors").read_bytes() for run in ("one", "two")]
        assert weights[0] == weights[1]
        load_llama(tmp_path / "one" / name)
