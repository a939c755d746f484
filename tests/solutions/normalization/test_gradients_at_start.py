"""The gradients of deep untrained stacks under pre-norm and post-norm, as Xiong et al. 2020 derive them.

Where sublayers add to the stream what does not come from it, as cross-attention does, the growth toward the top under
post-norm and the evenness under pre-norm are exact. In an encoder, whose sublayers pass gradients on as well, theorem
1 holds; from layer to layer post-norm's gradients grow only next to pre-norm's, which fall toward the top.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.models.block import ResidualFactory, TransformerBlock
from transformer_problems.models.encoder import Encoder
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.normalization.post_norm import PostNorm
from transformer_problems.solutions.normalization.pre_norm import PreNorm

VOCAB, WIDTH, NUM_SEEDS = 64, 32, 10


@pytest.mark.parametrize(("residual", "growth"), [(PreNorm, 1.0), (PostNorm, 2**0.5)])
def test_gradients_grow_by_root_two_at_each_post_norm_and_not_at_all_under_pre_norm(
    residual: ResidualFactory, growth: float
) -> None:
    torch.manual_seed(0)
    width, num_layers = 4096, 24
    streams = [torch.randn(8, width, requires_grad=True)]
    for _ in range(num_layers):
        brought = torch.randn(8, width)
        streams.append(residual(width)(streams[-1], lambda h, brought=brought: brought))
    gradients = torch.autograd.grad((streams[-1] * torch.randn(8, width)).sum(), streams)
    norms = torch.stack([gradient.norm() for gradient in gradients]).log()
    # sizes over 8 * 4096 numbers vary by 0.4%, and a norm takes 2 directions of 4096 away
    torch.testing.assert_close(norms.diff(), torch.full((num_layers,), math.log(growth)), atol=0.03, rtol=0)


def gradients_by_layer(residual: ResidualFactory, num_layers: int) -> Tensor:
    """Norm of the gradient of each layer's second feed-forward matrix, geometric mean over seeds, [L]."""

    def mixer() -> SelfAttention:
        return SelfAttention(WIDTH, 4, is_causal=False)

    total = torch.zeros(num_layers)
    for seed in range(NUM_SEEDS):
        torch.manual_seed(seed)
        model = Encoder(VOCAB, WIDTH, num_layers, mixer, residual=residual)
        for name, parameter in model.body.blocks.named_parameters():
            if parameter.dim() == 2:
                nn.init.xavier_normal_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        tokens, targets = torch.randint(VOCAB, (2, 4, 32))
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()
        for i, block in enumerate(model.body.blocks):
            assert isinstance(block, TransformerBlock)
            assert isinstance(block.feed_forward.down, nn.Linear)
            assert block.feed_forward.down.weight.grad is not None
            total[i] += block.feed_forward.down.weight.grad.norm().log() / NUM_SEEDS
    return total.exp()


@pytest.mark.parametrize(("residual", "exponent"), [(PreNorm, -0.5), (PostNorm, 0.0)])
def test_the_last_layers_gradient_falls_with_depth_under_pre_norm_alone(
    residual: ResidualFactory, exponent: float
) -> None:
    depths = (12, 96)
    shallow, deep = (float(gradients_by_layer(residual, depth)[-1]) for depth in depths)
    measured = math.log(deep / shallow) / math.log(depths[1] / depths[0])
    # models differ by up to 30%, means of ten by 10%: 0.07 in the exponent; half-way between the two lies 0.25
    assert abs(measured - exponent) < 0.2


def test_post_norms_gradients_grow_toward_the_top_next_to_pre_norms() -> None:
    pre, post = gradients_by_layer(PreNorm, 16), gradients_by_layer(PostNorm, 16)
    growth = (post / pre).log().diff()
    assert growth.sum() > math.log(2)
    assert int((growth > 0).sum()) >= 10, "of 15 steps from layer to layer a random walk would rise in 7 or 8"
