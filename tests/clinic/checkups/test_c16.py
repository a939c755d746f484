"""A model that has no use for detail is found out; one that has is not."""

import torch

from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.material import Material
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.problems.p16_dense_inputs.checkup import CHECKUP
from transformer_problems.problems.p16_dense_inputs.detail import coarser
from transformer_problems.problems.p16_dense_inputs.fault import FAULT


def test_tokens_for_nothing_are_found(vision: Subject, images: Material) -> None:
    healthy = CHECKUP.examine(Visit(vision, images)).readings["detail_change"].value
    ill = CHECKUP.examine(Visit(FAULT.plant(vision, 0), images)).readings["detail_change"].value
    assert ill < healthy / 3


def test_images_without_detail_move_nothing(vision: Subject) -> None:
    squares = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    enlarged = squares.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    found = CHECKUP.examine(Visit(vision, Material("squares", images=enlarged))).readings["detail_change"]
    assert found.value < 1e-5  # what float32 rounds a mean of four equal numbers to


def test_coarser_is_the_mean_of_squares_and_is_done_once() -> None:
    pixels = torch.arange(16.0).reshape(1, 1, 4, 4)
    once = coarser(pixels, 2)
    assert once[0, 0].tolist() == [[2.5, 2.5, 4.5, 4.5]] * 2 + [[10.5, 10.5, 12.5, 12.5]] * 2
    assert torch.equal(coarser(once, 2), once)
    assert coarser(torch.rand(1, 3, 7, 5), 2).shape == (1, 3, 7, 5)


def test_the_numbers_come_again_and_the_model_is_left_as_it_was(vision: Subject, images: Material) -> None:
    first, second = (CHECKUP.examine(Visit(vision, images)) for _ in range(2))
    assert first == second
    FAULT.plant(vision, 0)
    assert not vision.model._forward_pre_hooks


def test_flops_are_those_of_the_products_on_paper(vision: Subject, images: Material) -> None:
    figures = CHECKUP.examine(Visit(vision, images)).figures
    tokens, width = 65, 48  # 64 patches and a class token
    layer = 2 * tokens * width * (4 * width + 2 * 2 * width) + 4 * tokens**2 * width
    patches, head = 2 * 64 * (3 * 4 * 4) * width, 2 * width * 10
    assert figures["tokens"] == tokens
    assert figures["flops_per_image"] == vision.num_layers * layer + patches + head
