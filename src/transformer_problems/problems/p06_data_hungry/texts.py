"""The text task: which package of the standard library an excerpt of 128 bytes comes from."""

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.svm import LinearSVC
from torch import Tensor, nn

from transformer_problems.core.seeding import generator
from transformer_problems.lab.data.excerpts import PACKAGES, SOURCE_PACKAGES, load_excerpts, load_unlabelled
from transformer_problems.lab.data.text import sample_windows
from transformer_problems.lab.masking import MASK_TOKEN
from transformer_problems.lab.training import BatchLoss
from transformer_problems.models.encoder import Encoder
from transformer_problems.problems.p06_data_hungry.task import Task, Teacher
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.solutions.training.masked_tokens import mask_tokens

VOCAB_SIZE = MASK_TOKEN + 1
_LENGTH = 128
_NUM_TEST, _NUM_SOURCE = 300, 2000
_HEADS = 4


def text_task(num_train: int) -> Task:
    """Excerpts with their packages, and those of other packages to transfer from."""
    train = load_excerpts(PACKAGES, length=_LENGTH, num=num_train, is_test=False)
    test = load_excerpts(PACKAGES, length=_LENGTH, num=_NUM_TEST, is_test=True)
    source = load_excerpts(SOURCE_PACKAGES, length=_LENGTH, num=_NUM_SOURCE, is_test=False)
    return Task(
        train=(train.tokens, train.classes),
        test=(test.tokens, test.classes),
        source=(source.tokens, source.classes),
        classify=lambda model, tokens: model(tokens).mean(dim=1),
        teach=_n_gram_svm,
        set_accuracy=0.4,
    )


def text_model(width: int, num_outputs: int) -> Encoder:
    """A small encoder of bytes; its head is read at every token."""

    def mixer() -> SelfAttention:
        return SelfAttention(width, _HEADS, position=RotaryEmbedding(width // _HEADS), is_causal=False)

    return Encoder(VOCAB_SIZE, width, 2, mixer, num_outputs=num_outputs)


def masked_text_loss(batch_size: int, seed: int, device: torch.device) -> BatchLoss:
    """Masked prediction on the text of all ten packages but the test's files, unlabelled."""
    text = load_unlabelled((*PACKAGES, *SOURCE_PACKAGES))

    def loss(model: nn.Module, step: int) -> Tensor:
        draws = generator(seed, "unlabelled", step)
        windows = sample_windows(text, num=batch_size, length=_LENGTH, generator=draws)
        inputs, targets = mask_tokens(windows, mask_token=MASK_TOKEN, vocab_size=MASK_TOKEN, generator=draws)
        logits: Tensor = model(inputs.to(device))
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.to(device).flatten())

    return loss


def _n_gram_svm(tokens: Tensor, classes: Tensor) -> Teacher:
    """A linear support vector machine on n-grams of 2 to 5 bytes: needs far fewer labels than a Transformer."""
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(2, 5))
    machine = LinearSVC().fit(vectorizer.fit_transform(_strings(tokens)), classes.numpy())

    def scores(asked: Tensor) -> Tensor:
        return torch.tensor(machine.decision_function(vectorizer.transform(_strings(asked))), dtype=torch.float32)

    return scores


def _strings(tokens: Tensor) -> list[str]:
    return [bytes(row).decode("latin-1") for row in tokens.tolist()]
