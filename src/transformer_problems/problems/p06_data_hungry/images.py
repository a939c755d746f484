"""The image task: which of five digits an 8x8 image shows, for a small Vision Transformer."""

from collections.abc import Callable

import torch
from sklearn.svm import SVC
from torch import Tensor, nn

from transformer_problems.core.seeding import generator
from transformer_problems.lab.data.choice import draw_batch
from transformer_problems.lab.data.digits import SIZE, load_digit_tasks
from transformer_problems.lab.training import BatchLoss
from transformer_problems.models.stack import stack_layers
from transformer_problems.models.vision import VisionTransformer
from transformer_problems.problems.p06_data_hungry.task import Labelled, Task, Teacher
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.position.learned_grid import LearnedGridPositions
from transformer_problems.solutions.tokens.patch_embedding import PatchEmbedding
from transformer_problems.solutions.training.distillation_token import token_distillation_loss
from transformer_problems.solutions.training.masked_autoencoder import MaskedAutoencoder

_PATCH = 2
_HEADS = 4
_LAYERS = 3


def image_task() -> Task:
    """The digits 5 to 9, and 0 to 4 to transfer from."""
    tasks = load_digit_tasks()
    return Task(
        train=(tasks.train.pixels, tasks.train.classes),
        test=(tasks.test.pixels, tasks.test.classes),
        source=(tasks.source.pixels, tasks.source.classes),
        classify=lambda model, pixels: model(pixels),
        teach=_pixel_svm,
        set_accuracy=0.8,
    )


def image_model(width: int, num_classes: int, *, num_class_tokens: int = 1) -> VisionTransformer:
    """A small Vision Transformer of 16 patches; with two class tokens it can learn from a teacher."""
    patches = PatchEmbedding(width, _PATCH, in_channels=1)
    return VisionTransformer(
        patches, (SIZE, SIZE), _LAYERS, _mixer_of(width), num_classes, num_class_tokens=num_class_tokens
    )


def masked_image_model(width: int) -> MaskedAutoencoder:
    """The same model with a decoder of half its width and one layer; its head is not used."""
    encoder, narrow = image_model(width, 1), width // 2
    decoder = stack_layers(narrow, 1, _mixer_of(narrow), is_causal=False)
    return MaskedAutoencoder(encoder, decoder, LearnedGridPositions(SIZE // _PATCH, SIZE // _PATCH, narrow))


def masked_image_loss(task: Task, batch_size: int, seed: int, device: torch.device) -> BatchLoss:
    """Painting in hidden patches of all images but the test's, unlabelled."""
    pixels = torch.cat([task.train[0], task.source[0]])

    def loss(model: nn.Module, step: int) -> Tensor:
        images = pixels[draw_batch(len(pixels), batch_size, seed, step)].to(device)
        error: Tensor = model(images, generator=generator(seed, "hidden", step))
        return error

    return loss


def taught_loss(
    task: Task, labelled: Labelled, is_hard: bool, batch_size: int, seed: int, device: torch.device
) -> BatchLoss:
    """The class token learns from the labels, the distillation token from a teacher that was trained on them and now
    answers for the images without labels too."""
    pixels, classes = labelled
    teacher = task.teach(pixels, classes)(task.train[0])

    def loss(model: nn.Module, step: int) -> Tensor:
        assert isinstance(model, VisionTransformer)
        few = draw_batch(len(classes), batch_size, seed, step)
        many = draw_batch(len(teacher), batch_size, seed, step)
        heads = model.logits_of_heads(torch.cat([pixels[few], task.train[0][many]]).to(device))
        return token_distillation_loss(
            heads[:batch_size, 0],
            heads[batch_size:, 1],
            teacher[many].to(device),
            classes[few].to(device),
            kind="hard" if is_hard else "soft",
        )

    return loss


def _mixer_of(width: int) -> Callable[[], SelfAttention]:
    return lambda: SelfAttention(width, _HEADS, is_causal=False)


def _pixel_svm(pixels: Tensor, classes: Tensor) -> Teacher:
    """A support vector machine on the pixels, whose radial kernel already says that near images look alike."""
    machine = SVC().fit(pixels.flatten(1).numpy(), classes.numpy())

    def scores(asked: Tensor) -> Tensor:
        return torch.tensor(machine.decision_function(asked.flatten(1).numpy()), dtype=torch.float32)

    return scores
