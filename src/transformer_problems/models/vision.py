"""The Vision Transformer: patches of an image as tokens of a bidirectional Transformer that names what it shows."""

import math
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive_int, require_sizes
from transformer_problems.core.errors import ArgumentError, UnknownNameError
from transformer_problems.core.fit import check_dtype_fit, check_embedding_fit, check_skips_fit
from transformer_problems.core.inputs import check_floating
from transformer_problems.core.slots import LongSkips, token_positions
from transformer_problems.models.block import ResidualFactory
from transformer_problems.models.stack import MixerFactory, stack_layers
from transformer_problems.solutions.normalization.pre_norm import PreNorm
from transformer_problems.solutions.position.learned_grid import LearnedGridPositions

Pool = Literal["class", "mean", "attention"]


class ImageEmbedding(Protocol):
    """Turns images into tokens that lie on a grid, row by row: patches, or a stem of convolutions.

    Shape:
        images: [B, C_in, H, W]; output: [B, N, C] with N = rows * columns of `grid(H, W)`, C = `embed_dim`.
    """

    embed_dim: int

    def __call__(self, images: Tensor) -> Tensor: ...

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of such an image; refuses sizes that it cannot embed."""
        ...


class VisionTransformer(nn.Module):
    """Embeds an image's patches, adds where they lie, runs the layers and classifies.

    Images of any size that the embedding takes may follow: positions are interpolated. A second class token has a head
    of its own, which can learn from a teacher (see `token_distillation_loss`); the model's answer is then the mean of
    both heads' probabilities, given as logarithms.

    `device` and `dtype`, where given, are those of the whole model: parts that are passed in are converted too.

    Args:
        patches: Makes tokens of images, e.g. PatchEmbedding; says the model's width.
        image_size: Height and width of images, in pixels, for whose grid positions are learned.
        num_layers: L.
        mixer: Called once a layer; returns that layer's bidirectional token mixer.
        num_classes: K.
        pool: What the head reads: "class" tokens; or, without them, the "mean" of all patches, or with "attention"
            their mean weighted by the softmax of a learned score.
        residual: Makes what joins each sublayer to its input. Default PreNorm.
        skips: Leads from early layers to late ones. Default none.
        num_class_tokens: T, each with its own head.

    Shape:
        images: [B, C_in, H, W]; output: logits [B, K].

    Raises:
        CombinationError: If a mixer's causality or width, the long skips, or an embedding of clips do not fit.
        ArgumentError: If a size is not positive, `patches` makes no tokens, `mixer` is no function that makes mixers,
            or an image does not fit the embedding.
        UnknownNameError: If there is no such pool.

    Source:
        Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.1; two class tokens: Touvron et al. 2020,
        arXiv:2012.12877, section 4; pool="attention": Hassani et al. 2021, arXiv:2104.05704, section 3.
        Differs from the papers: class tokens get no position, which would only add one constant to another.

    Example:
        >>> from transformer_problems import PatchEmbedding, SelfAttention, VisionTransformer
        >>> def mixer():
        ...     return SelfAttention(64, num_heads=4, is_causal=False)
        >>> model = VisionTransformer(PatchEmbedding(64, 4), (32, 32), num_layers=2, mixer=mixer, num_classes=10)
    """

    def __init__(
        self,
        patches: ImageEmbedding,
        image_size: tuple[int, int],
        num_layers: int,
        mixer: MixerFactory,
        num_classes: int,
        *,
        pool: Pool = "class",
        residual: ResidualFactory = PreNorm,
        skips: LongSkips | None = None,
        num_class_tokens: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_sizes("image_size", image_size, ("height", "width"))
        check_embedding_fit("patches", patches, image_size)
        require_positive_int(num_classes=num_classes, num_class_tokens=num_class_tokens)
        if pool not in get_args(Pool):
            raise UnknownNameError("pool", pool, get_args(Pool))
        if pool != "class" and num_class_tokens != 1:
            raise ArgumentError(
                f"num_class_tokens must be left out with pool={pool!r}, which has no class tokens; got "
                f"{num_class_tokens}. Choose pool='class'."
            )
        width = self.embed_dim = patches.embed_dim
        self.num_class_tokens = num_class_tokens if pool == "class" else 0
        self.patches = patches
        self.positions = LearnedGridPositions(*patches.grid(*image_size), width, device=device, dtype=dtype)
        self.class_tokens = None
        if self.num_class_tokens:
            self.class_tokens = nn.Parameter(torch.empty(self.num_class_tokens, width, device=device, dtype=dtype))
            nn.init.normal_(self.class_tokens, std=0.02)
        score = None if pool != "attention" else nn.Linear(width, 1, bias=False, device=device, dtype=dtype)
        self.blocks = stack_layers(
            width, num_layers, mixer, is_causal=False, residual=residual, device=device, dtype=dtype
        )
        check_skips_fit(skips, num_layers=num_layers, embed_dim=width)
        self.skips = skips
        self.norm = nn.LayerNorm(width, device=device, dtype=dtype)
        self.score = score  # part of the head to whoever goes by the order of a model's modules
        self.head = nn.ModuleList(
            nn.Linear(width, num_classes, device=device, dtype=dtype) for _ in range(num_class_tokens)
        )
        self.to(device=device, dtype=dtype)
        check_dtype_fit(self.norm.weight, (patches, *(block.mixer for block in self.blocks)))

    def forward(self, images: Tensor) -> Tensor:
        logits = self.logits_of_heads(images)
        if logits.shape[1] == 1:
            return logits[:, 0]
        return logits.log_softmax(dim=-1).logsumexp(dim=1) - math.log(logits.shape[1])

    def logits_of_heads(self, images: Tensor) -> Tensor:
        """What each class token's head says, [B, T, K]; without class tokens there is one head."""
        pooled = self._pooled(self.features(images))
        return torch.stack([head(pooled[:, i]) for i, head in enumerate(self.head)], dim=1)

    def features(self, images: Tensor) -> Tensor:
        """All tokens after the last norm, [B, T + N, C]: class tokens, then patches."""
        return self.encode(self.embed(images))

    def embed(self, images: Tensor) -> Tensor:
        """Tokens of the patches with their positions, [B, N, C]."""
        tokens = self.patches(images)  # first, as it refuses what are no images
        x: Tensor = self.positions(tokens, self.patches.grid(*images.shape[-2:]))
        return x

    def encode(self, tokens: Tensor, *, places: Tensor | None = None) -> Tensor:
        """Runs the layers on the class tokens and on all or some of the patches' tokens.

        Args:
            places: Which of an image's patches these are, counted row by row; mixers see it as their positions.
                Default all of them.

        Shape:
            tokens: [B, n, C]; places: [n] or [B, n]; output: [B, T + n, C].

        Raises:
            ArgumentError: If the tokens have another shape or dtype, or there is not one place for each.
        """
        check_floating("tokens", tokens)
        if tokens.dim() != 3 or tokens.shape[2] != self.embed_dim:
            raise ArgumentError(
                f"tokens must be [B, n, {self.embed_dim}]; got {list(tokens.shape)}. Give those of one image as "
                "tokens[None]."
            )
        if places is None:
            places = token_positions(tokens.shape[1], tokens.device)
        elif places.shape not in (tokens.shape[:2], tokens.shape[1:2]):
            raise ArgumentError(
                f"places must be {list(tokens.shape[1:2])} or {list(tokens.shape[:2])}, one for each token; got "
                f"{list(places.shape)}. Leave it out if these are all of an image's patches."
            )
        if self.class_tokens is not None:
            tokens = torch.cat([self.class_tokens.expand(tokens.shape[0], -1, -1), tokens], dim=1)
            first = token_positions(self.num_class_tokens, tokens.device)
            places = torch.cat([first.expand(*places.shape[:-1], -1), places + self.num_class_tokens], dim=-1)
        y: Tensor = self.norm(self.blocks(tokens, key_mask=None, positions=places, skips=self.skips))
        return y

    def _pooled(self, x: Tensor) -> Tensor:
        """What each head reads, [B, T + N, C] -> [B, heads, C]."""
        if self.num_class_tokens:
            return x[:, : self.num_class_tokens]
        if self.score is None:
            return x.mean(dim=1, keepdim=True)
        weighted: Tensor = self.score(x).softmax(dim=1).mT @ x
        return weighted
