"""Healthy small models of many forms, to plant faults in: the check-ups are calibrated and tested on them."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from transformer_problems.checkpoints.bundled import bundled
from transformer_problems.checkpoints.subject import Kind, Subject
from transformer_problems.core.dependencies import require
from transformer_problems.core.seeding import generator, seeded
from transformer_problems.lab.data.digits import load_digit_images
from transformer_problems.lab.data.text import load_text, sample_windows
from transformer_problems.lab.data.upscaled_digits import upscaled
from transformer_problems.lab.training import TrainingPlan, plain_recipe, train

TRAINED_LEN = 256  # tokens of the windows that models of text are trained on
DECLARED_LEN = 128  # what their configs say, so that a healthy model is well beyond its declared length too
_IMAGE_SIDE = 32
_NUM_HEADS = 4
_STEPS: dict[Kind, int] = {"causal": 120, "encoder": 120, "image": 500}  # fewer leave images worse than untrained
_FORMS: dict[Kind, tuple[str, ...]] = {
    "causal": ("llama", "gpt2", "bloom"),
    "encoder": ("bert", "roberta", "electra"),
    "image": ("vit", "deit", "swin"),
}


@dataclass(frozen=True, slots=True)
class Patient:
    """One healthy model of the ward: which form, how wide and deep, and the seed of its weights and training."""

    kind: Kind
    form: str
    embed_dim: int
    num_layers: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.form}-{self.embed_dim}x{self.num_layers}-{self.seed}"


def patients(kind: Kind, num: int) -> list[Patient]:
    """Models of a kind, no two alike, of all its forms in turn."""
    forms = _FORMS[kind]
    return [
        Patient(kind, forms[i % len(forms)], (48, 64)[i // len(forms) % 2], 2 + i // (2 * len(forms)) % 2, seed=i)
        for i in range(num)
    ]


def admit(patient: Patient, cache: Path) -> Subject:
    """The trained model; trained once, and kept in a folder that may be removed at any time."""
    with seeded(patient.seed, "ward"):
        model = _untrained(patient)
    file = cache / f"{patient.name}-{_fingerprint()}.safetensors"
    if file.is_file():
        model.load_state_dict(load_file(file), strict=False)
    else:
        _train(model, patient)
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{id(model)}.part")
        state = {key: value.clone() for key, value in model.state_dict().items()}  # tied ones too, each by itself
        save_file(state, unfinished)
        unfinished.replace(file)
    if patient.kind != "image":
        _declare(model, DECLARED_LEN)
    return Subject(patient.name, patient.kind, model.eval(), None if patient.kind == "image" else byte_tokenizer())


def byte_tokenizer() -> Any:
    """The bundled tokenizer of bytes, with tokens to pad and to mask."""
    transformers = require("transformers", extra="clinic")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(bundled("base") / "tokenizer.json"))
    tokenizer.add_special_tokens({"pad_token": "<|pad|>", "mask_token": "<|mask|>"})
    return tokenizer


def _untrained(patient: Patient) -> nn.Module:
    transformers = require("transformers", extra="clinic")
    name = {
        "llama": "LlamaForCausalLM",
        "gpt2": "GPT2LMHeadModel",
        "bloom": "BloomForCausalLM",
        "bert": "BertForMaskedLM",
        "roberta": "RobertaForMaskedLM",
        "electra": "ElectraForMaskedLM",
        "vit": "ViTForImageClassification",
        "deit": "DeiTForImageClassification",
        "swin": "SwinForImageClassification",
    }[patient.form]
    config = {"causal": _causal_config, "encoder": _encoder_config, "image": _image_config}[patient.kind]
    model: nn.Module = getattr(transformers, name)(config(transformers, patient))
    return model


def _causal_config(transformers: Any, patient: Patient) -> Any:
    vocab_size = len(byte_tokenizer())
    if patient.form == "llama":
        return transformers.LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=patient.embed_dim,
            intermediate_size=2 * patient.embed_dim,
            num_hidden_layers=patient.num_layers,
            num_attention_heads=_NUM_HEADS,
            max_position_embeddings=TRAINED_LEN,
            tie_word_embeddings=True,
        )
    config = transformers.GPT2Config if patient.form == "gpt2" else transformers.BloomConfig
    return config(
        vocab_size=vocab_size,
        hidden_size=patient.embed_dim,
        num_hidden_layers=patient.num_layers,
        num_attention_heads=_NUM_HEADS,
        bos_token_id=None,
        eos_token_id=None,
        **({"max_position_embeddings": TRAINED_LEN} if patient.form == "gpt2" else {}),
    )


def _encoder_config(transformers: Any, patient: Patient) -> Any:
    config = {
        "bert": transformers.BertConfig,
        "roberta": transformers.RobertaConfig,
        "electra": transformers.ElectraConfig,
    }[patient.form]
    return config(
        vocab_size=len(byte_tokenizer()),
        hidden_size=patient.embed_dim,
        embedding_size=patient.embed_dim,
        intermediate_size=2 * patient.embed_dim,
        num_hidden_layers=patient.num_layers,
        num_attention_heads=_NUM_HEADS,
        max_position_embeddings=TRAINED_LEN + (2 if patient.form == "roberta" else 0),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def _image_config(transformers: Any, patient: Patient) -> Any:
    if patient.form == "swin":
        return transformers.SwinConfig(
            image_size=_IMAGE_SIDE,
            num_labels=10,
            patch_size=4,
            embed_dim=patient.embed_dim // 2,
            depths=(patient.num_layers, 2),
            num_heads=(2, 4),
            window_size=4,
        )
    config = transformers.ViTConfig if patient.form == "vit" else transformers.DeiTConfig
    return config(
        image_size=_IMAGE_SIDE,
        num_labels=10,
        patch_size=4,
        hidden_size=patient.embed_dim,
        intermediate_size=2 * patient.embed_dim,
        num_hidden_layers=patient.num_layers,
        num_attention_heads=_NUM_HEADS,
    )


def _train(model: nn.Module, patient: Patient) -> None:
    loss = {"causal": _next_token_loss, "encoder": _masked_loss, "image": _class_loss}[patient.kind]
    train(model, loss(patient), TrainingPlan(_STEPS[patient.kind], plain_recipe(), seed=patient.seed))


def _next_token_loss(patient: Patient) -> Callable[[nn.Module, int], Tensor]:
    text = load_text().train

    def loss(model: nn.Module, step: int) -> Tensor:
        tokens = sample_windows(text, num=4, length=TRAINED_LEN, generator=generator(patient.seed, "ward", step))
        logits = model(input_ids=tokens).logits[:, :-1]
        return nn.functional.cross_entropy(logits.mT, tokens[:, 1:])

    return loss


def _masked_loss(patient: Patient) -> Callable[[nn.Module, int], Tensor]:
    text, mask_id = load_text().train, byte_tokenizer().mask_token_id

    def loss(model: nn.Module, step: int) -> Tensor:
        draws = generator(patient.seed, "ward", step)
        tokens = sample_windows(text, num=4, length=TRAINED_LEN, generator=draws)
        hidden = torch.rand(tokens.shape, generator=draws) < 0.15
        logits = model(input_ids=tokens.masked_fill(hidden, mask_id)).logits
        return nn.functional.cross_entropy(logits[hidden], tokens[hidden])

    return loss


def _class_loss(patient: Patient) -> Callable[[nn.Module, int], Tensor]:
    known = upscaled(load_digit_images()[0], _IMAGE_SIDE)
    pixels = known.pixels.expand(-1, 3, -1, -1) * 2 - 1

    def loss(model: nn.Module, step: int) -> Tensor:
        chosen = torch.randint(len(pixels), (16,), generator=generator(patient.seed, "ward", step))
        return nn.functional.cross_entropy(model(pixel_values=pixels[chosen]).logits, known.classes[chosen])

    return loss


def _declare(model: nn.Module, length: int) -> None:
    config = cast("Any", model).config
    name = "seq_length" if config.model_type == "bloom" else "max_position_embeddings"
    setattr(config, name, length)


def _fingerprint() -> str:
    """Changes with what makes the models: this file and the version of transformers."""
    made_by = Path(__file__).read_text(encoding="utf-8") + require("transformers", extra="clinic").__version__
    return hashlib.sha256(made_by.encode()).hexdigest()[:12]
