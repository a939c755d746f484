"""Masked autoencoding: most of an image's patches are hidden, and the model paints them in from the rest."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_share
from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.fit import check_built_for
from transformer_problems.core.slots import token_positions

_EPSILON = 1e-6  # of the variance of a patch's pixels, for patches of one colour


class ImageEncoder(Protocol):
    """What learns: `VisionTransformer` is one.

    `patches` has `grid(H, W)`, the rows and columns of an image's patches; `cut(images)`, their pixels [B, N, P];
    and `patch_dim`, P. `PatchEmbedding` is one.
    """

    embed_dim: int
    patches: Any

    def embed(self, images: Tensor) -> Tensor:
        """A token for each patch, with its position, [B, N, C]."""
        ...

    def encode(self, tokens: Tensor, *, places: Tensor) -> Tensor:
        """The layers on some of these tokens, [B, n, C] at places [B, n] -> [B, T + n, C] after T tokens of its own."""
        ...


class PatchDecoder(Protocol):
    """Layers of another width C', [B, N, C'] -> [B, N, C']: `stack_layers` makes such."""

    def __call__(self, x: Tensor, *, key_mask: None, positions: Tensor) -> Tensor: ...


class GridPositions(Protocol):
    """Adds to the tokens of a grid, [B, N, C'], where they lie: `LearnedGridPositions` is one."""

    embed_dim: int

    def __call__(self, x: Tensor, grid: tuple[int, int]) -> Tensor: ...


class MaskedAutoencoder(nn.Module):
    """The encoder sees the visible patches only; a light decoder predicts the pixels of the hidden ones.

    The loss is the mean squared error over hidden patches. Three quarters hidden leave too little for copying from
    neighbours, so that the encoder must learn what images look like, and its layers run on a quarter of the tokens.
    Afterwards the encoder is used and fine-tuned as it is; the decoder is thrown away.

    Args:
        encoder: What learns, e.g. a VisionTransformer over a PatchEmbedding; its heads are left alone.
        decoder: Layers that see all places; narrower and fewer than the encoder's will do.
        positions: Of the decoder's tokens; its `embed_dim` says the decoder's width C'.
        mask_share: Share of the patches that is hidden, rounded to whole patches.
        normalize_targets: Predict each patch's pixels less their mean, over their standard deviation.

    Shape:
        images: [B, C_in, H, W]; output: the loss, a scalar.

    Raises:
        ArgumentError: If the share hides nothing or everything, or there is no image.
        CombinationError: If the encoder's patches cannot be cut out, or have a single number to normalize.

    Source:
        He et al. 2021, arXiv:2111.06377, section 3.
        Differs from the paper: positions are those injected, where it uses fixed sines and cosines.

    Example:
        >>> import torch
        >>> from transformer_problems import LearnedGridPositions, MaskedAutoencoder, PatchEmbedding, SelfAttention
        >>> from transformer_problems import VisionTransformer, stack_layers
        >>> patches = PatchEmbedding(64, 4)
        >>> model = VisionTransformer(patches, (32, 32), 2, lambda: SelfAttention(64, 4, is_causal=False), 10)
        >>> decoder = stack_layers(32, 1, lambda: SelfAttention(32, 4, is_causal=False), is_causal=False)
        >>> pretraining = MaskedAutoencoder(model, decoder, LearnedGridPositions(*patches.grid(32, 32), 32))
        >>> loss = pretraining(torch.randn(8, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        decoder: PatchDecoder,
        positions: GridPositions,
        *,
        mask_share: float = 0.75,
        normalize_targets: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for part in (encoder, decoder, positions):
            check_built_for(part)
        require_share(mask_share=mask_share)
        if not hasattr(encoder.patches, "cut"):
            raise CombinationError(
                f"the encoder's patches must be of pixels that can be hidden; {type(encoder.patches).__name__} has no "
                "`cut`. Build the encoder with PatchEmbedding."
            )
        if normalize_targets and encoder.patches.patch_dim == 1:
            raise CombinationError(
                "a patch of a single number has no standard deviation. Pass normalize_targets=False, or choose a "
                "patch_size above 1."
            )
        self.encoder, self.decoder, self.positions = encoder, decoder, positions
        self.mask_share, self.normalize_targets = mask_share, normalize_targets
        width = positions.embed_dim
        self.to_decoder = nn.Linear(encoder.embed_dim, width, device=device, dtype=dtype)
        self.mask_token = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        nn.init.normal_(self.mask_token, std=0.02)
        self.norm = nn.LayerNorm(width, device=device, dtype=dtype)
        self.to_pixels = nn.Linear(width, encoder.patches.patch_dim, device=device, dtype=dtype)

    def forward(self, images: Tensor, *, generator: torch.Generator) -> Tensor:
        """The loss with patches hidden at random; the generator draws on its own device."""
        if len(images) == 0:
            raise ArgumentError(f"images must hold at least one; got {list(images.shape)}. Leave this batch out.")
        targets = self.targets(images)
        hidden = self._draw_hidden(len(targets), targets.shape[1], generator).to(images.device)
        errors = (self.predict(images, hidden).to(targets.dtype) - targets).square().mean(dim=-1)
        return errors[hidden].mean()

    def predict(self, images: Tensor, hidden: Tensor) -> Tensor:
        """What each patch is thought to be, hidden or not, in the terms of `targets`, [B, N, P].

        Args:
            hidden: [B, N] bool, True where the encoder must not look; as many in each row.
        """
        tokens = self.encoder.embed(images)
        num_visible = _num_visible(hidden, tokens)
        places = hidden.to(torch.uint8).argsort(dim=1, stable=True)[:, :num_visible]
        index = places[..., None]
        seen = self.encoder.encode(tokens.gather(1, index.expand(-1, -1, tokens.shape[-1])), places=places)
        num_others = seen.shape[1] - num_visible  # class tokens
        others, visible = self.to_decoder(seen).tensor_split([num_others], dim=1)
        x = self.mask_token.to(visible.dtype).expand(*hidden.shape, -1)
        x = x.scatter(1, index.expand_as(visible), visible)
        x = torch.cat([others, self.positions(x, self.encoder.patches.grid(*images.shape[-2:]))], dim=1)
        x = self.decoder(x, key_mask=None, positions=token_positions(x.shape[1], x.device))
        pixels: Tensor = self.to_pixels(self.norm(x[:, num_others:]))
        return pixels

    def targets(self, images: Tensor) -> Tensor:
        """What is to be predicted of each patch, [B, N, P], at least float32."""
        pixels: Tensor = self.encoder.patches.cut(images)
        pixels = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
        if not self.normalize_targets:
            return pixels
        variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
        return (pixels - mean) / (variance + _EPSILON).sqrt()

    def extra_repr(self) -> str:
        return f"mask_share={self.mask_share}, normalize_targets={self.normalize_targets}"

    def _draw_hidden(self, batch_size: int, num_patches: int, generator: torch.Generator) -> Tensor:
        """[B, N] bool, the same number in each row."""
        num_hidden = round(self.mask_share * num_patches)
        if not 0 < num_hidden < num_patches:
            raise ArgumentError(
                f"mask_share must hide at least one of {num_patches} patches and leave at least one; {self.mask_share} "
                f"hides {num_hidden}. Choose 0.75, or smaller patches."
            )
        draws = torch.rand(batch_size, num_patches, generator=generator, device=generator.device)
        visible = draws.argsort(dim=1)[:, : num_patches - num_hidden]
        return torch.ones_like(draws, dtype=torch.bool).scatter(1, visible, False)


def _num_visible(hidden: Tensor, tokens: Tensor) -> int:
    """How many patches are visible in each row; refuses what is no mask of them."""
    if hidden.dtype != torch.bool or hidden.shape != tokens.shape[:2]:
        raise ArgumentError(
            f"hidden must be bool {list(tokens.shape[:2])}, True for hidden patches; got {hidden.dtype} "
            f"{list(hidden.shape)}."
        )
    counts = set((~hidden).sum(dim=1).tolist())
    if len(counts) > 1 or 0 in counts:
        raise ArgumentError(
            f"hidden must leave as many patches visible in each row, at least one; it leaves {sorted(counts)}."
        )
    return counts.pop() if counts else 0
