"""Video Vision Transformers: a clip's tokens attend to each other all at once, or within each step and then in time."""

from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive_int, require_sizes
from transformer_problems.core.errors import UnknownNameError
from transformer_problems.core.fit import check_dtype_fit, check_embedding_fit
from transformer_problems.core.slots import token_positions
from transformer_problems.models.stack import MixerFactory, stack_layers
from transformer_problems.solutions.position.learned_grid import LearnedGridPositions

ClipPool = Literal["class", "mean"]


class ClipEmbedding(Protocol):
    """Turns clips into tokens that lie on a grid in time and space, step by step and row by row.

    Shape:
        clips: [B, C_in, T, H, W]; output: [B, N, C] with N the product of `grid(T, H, W)`, C = `embed_dim`.
    """

    embed_dim: int

    def __call__(self, clips: Tensor) -> Tensor: ...

    def grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Steps, rows and columns of tokens of such a clip; refuses sizes that it cannot embed."""
        ...


class JointVideoEncoder(nn.Module):
    """Embeds a clip's tubelets, adds where and when they are, runs the layers on all tokens at once and classifies.

    Attention over all steps and places costs (steps * places)^2. Clips of any length and size that the embedding takes
    may follow: positions are interpolated.

    `device` and `dtype`, where given, are those of the whole model: parts that are passed in are converted too.

    Args:
        tubelets: Makes tokens of clips, e.g. TubeletEmbedding; says the model's width C.
        clip_size: Frames, height and width of clips for whose grid positions are learned.
        num_layers: L.
        mixer: Called once a layer; returns that layer's bidirectional token mixer.
        num_classes: K.
        pool: What the head reads: a "class" token, or the "mean" of all tokens.

    Shape:
        clips: [B, C_in, T, H, W]; output: logits [B, K].

    Raises:
        CombinationError: If a mixer's causality or width, or an embedding of images, does not fit.
        ArgumentError: If a size is not positive, `tubelets` makes no tokens, `mixer` is no function that makes mixers,
            or a clip does not fit the embedding.
        UnknownNameError: If there is no such pool.

    Source:
        Arnab et al. 2021, arXiv:2103.15691, section 3.3, model 1.
        Differs from the paper: a position is the sum of one in the frame and one in time, where each token of the clip
        has its own there; the class token has none, which would only add one constant to another.
    """

    def __init__(
        self,
        tubelets: ClipEmbedding,
        clip_size: tuple[int, int, int],
        num_layers: int,
        mixer: MixerFactory,
        num_classes: int,
        *,
        pool: ClipPool = "class",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_int(num_classes=num_classes)
        self.tokens = _PlacedTubelets(tubelets, clip_size, device=device, dtype=dtype)
        width = self.embed_dim = tubelets.embed_dim
        self.time = LearnedGridPositions(self.tokens.num_steps, 1, width, device=device, dtype=dtype)
        self.encoder = _PoolingEncoder(width, num_layers, mixer, pool, device=device, dtype=dtype)
        self.head = nn.Linear(width, num_classes, device=device, dtype=dtype)
        self.to(device=device, dtype=dtype)
        check_dtype_fit(self.head.weight, (tubelets, *self.encoder.mixers))

    def forward(self, clips: Tensor) -> Tensor:
        tokens = self.tokens(clips)  # [B, steps, places, C]
        steps = tokens.shape[1]
        times = self.time(tokens.new_zeros(1, steps, self.embed_dim), (steps, 1))
        logits: Tensor = self.head(self.encoder((tokens + times[:, :, None]).flatten(1, 2)))
        return logits


class FactorisedVideoEncoder(nn.Module):
    """Sums up each step of a clip in one vector, by a spatial encoder, and the steps by a temporal one; classifies.

    Tokens attend within their own step only, and the steps' vectors to each other: steps * places^2 + steps^2 scores in
    place of (steps * places)^2, but what moved where is only compared between whole steps. Clips of any length and
    size that the embedding takes may follow: positions are interpolated.

    `device` and `dtype`, where given, are those of the whole model: parts that are passed in are converted too.

    Args:
        tubelets: Makes tokens of clips, e.g. TubeletEmbedding; says the model's width C.
        clip_size: Frames, height and width of clips for whose grid positions are learned.
        num_spatial_layers: Run on the tokens of each step.
        num_temporal_layers: Run on the steps' vectors.
        mixer: Called once a layer, the spatial ones first; returns that layer's bidirectional token mixer.
        num_classes: K.
        pool: What sums up a step, and then the clip: a "class" token of its own, or the "mean".

    Shape:
        clips: [B, C_in, T, H, W]; output: logits [B, K].

    Raises:
        CombinationError: If a mixer's causality or width, or an embedding of images, does not fit.
        ArgumentError: If a size is not positive, `tubelets` makes no tokens, `mixer` is no function that makes mixers,
            or a clip does not fit the embedding.
        UnknownNameError: If there is no such pool.

    Source:
        Arnab et al. 2021, arXiv:2103.15691, section 3.3, model 2. As in the authors' code, each encoder adds positions
        and ends in a norm. Differs from it: class tokens have no position, which would only add one constant to
        another.

    Example:
        >>> from transformer_problems import FactorisedVideoEncoder, SelfAttention, TubeletEmbedding
        >>> def mixer():
        ...     return SelfAttention(64, num_heads=4, is_causal=False)
        >>> tubelets = TubeletEmbedding(64, patch_size=8, tubelet_len=2)
        >>> model = FactorisedVideoEncoder(tubelets, (16, 32, 32), 2, 1, mixer, num_classes=10)
    """

    def __init__(
        self,
        tubelets: ClipEmbedding,
        clip_size: tuple[int, int, int],
        num_spatial_layers: int,
        num_temporal_layers: int,
        mixer: MixerFactory,
        num_classes: int,
        *,
        pool: ClipPool = "class",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_int(
            num_spatial_layers=num_spatial_layers, num_temporal_layers=num_temporal_layers, num_classes=num_classes
        )
        self.tokens = _PlacedTubelets(tubelets, clip_size, device=device, dtype=dtype)
        width = self.embed_dim = tubelets.embed_dim
        self.spatial = _PoolingEncoder(width, num_spatial_layers, mixer, pool, device=device, dtype=dtype)
        self.time = LearnedGridPositions(self.tokens.num_steps, 1, width, device=device, dtype=dtype)
        self.temporal = _PoolingEncoder(width, num_temporal_layers, mixer, pool, device=device, dtype=dtype)
        self.head = nn.Linear(width, num_classes, device=device, dtype=dtype)
        self.to(device=device, dtype=dtype)
        check_dtype_fit(self.head.weight, (tubelets, *self.spatial.mixers, *self.temporal.mixers))

    def forward(self, clips: Tensor) -> Tensor:
        tokens = self.tokens(clips)  # [B, steps, places, C]
        steps = self.spatial(tokens.flatten(0, 1)).view(*tokens.shape[:2], self.embed_dim)
        logits: Tensor = self.head(self.temporal(self.time(steps, (tokens.shape[1], 1))))
        return logits


class _PlacedTubelets(nn.Module):
    """A clip's tokens with their places in the frame, [B, C_in, T, H, W] -> [B, steps, places, C]."""

    def __init__(
        self,
        tubelets: ClipEmbedding,
        clip_size: tuple[int, int, int],
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        require_sizes("clip_size", clip_size, ("frames", "height", "width"))
        check_embedding_fit("tubelets", tubelets, clip_size)
        self.num_steps, rows, columns = tubelets.grid(*clip_size)
        self.tubelets = tubelets
        self.positions = LearnedGridPositions(rows, columns, tubelets.embed_dim, device=device, dtype=dtype)

    def forward(self, clips: Tensor) -> Tensor:
        tokens = self.tubelets(clips)
        steps, rows, columns = self.tubelets.grid(*clips.shape[2:])
        in_steps = tokens.unflatten(1, (steps, rows * columns))
        placed: Tensor = self.positions(in_steps.flatten(0, 1), (rows, columns)).view(in_steps.shape)
        return placed


class _PoolingEncoder(nn.Module):
    """Runs layers on tokens and sums them up in one vector, [B, N, C] -> [B, C]."""

    def __init__(
        self,
        embed_dim: int,
        num_layers: int,
        mixer: MixerFactory,
        pool: ClipPool,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if pool not in get_args(ClipPool):
            raise UnknownNameError("pool", pool, get_args(ClipPool))
        self.class_token = None
        if pool == "class":
            self.class_token = nn.Parameter(torch.empty(embed_dim, device=device, dtype=dtype))
            nn.init.normal_(self.class_token, std=0.02)
        self.blocks = stack_layers(embed_dim, num_layers, mixer, is_causal=False, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(embed_dim, device=device, dtype=dtype)

    @property
    def mixers(self) -> list[object]:
        return [block.mixer for block in self.blocks]

    def forward(self, x: Tensor) -> Tensor:
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)
        y: Tensor = self.norm(self.blocks(x, key_mask=None, positions=token_positions(x.shape[1], x.device)))
        return y.mean(dim=1) if self.class_token is None else y[:, 0]
