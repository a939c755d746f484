"""Whether what a layer is given is a tensor that it can take, with messages that name what came and what would do."""

import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError


def check_floating(name: str, x: Tensor) -> None:
    """Refuse what is no tensor of floating-point numbers, such as a path or a list.

    Raises:
        ArgumentError: With the remedy.
    """
    if not isinstance(x, Tensor):
        raise ArgumentError(
            f"{name} must be a floating-point tensor; got {shown(x)}. "
            "Pass torch.as_tensor(values), or of a file what it holds."
        )
    if not x.is_floating_point():
        raise ArgumentError(f"{name} must be floating point; got {shown(x)}. Pass {name}.float(), or embed it first.")


def check_tokens(tokens: Tensor, name: str = "tokens") -> None:
    """Refuse what is no batch of tokens.

    Raises:
        ArgumentError: Unless they are whole numbers [B, N].
    """
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise ArgumentError(
            f"{name} must be whole numbers [B, N]; got {shown(tokens)}. Give one sequence as {name}[None], others as "
            f"{name}.long()."
        )


def check_same_dtype(name: str, x: Tensor, weight: Tensor, owner: str) -> None:
    """Refuse an input of another dtype than the weight that it meets first; autocast makes them alike itself.

    Raises:
        ArgumentError: With the remedy.
    """
    if x.dtype == weight.dtype or makes_alike(x.device, x.dtype, weight.dtype):
        return
    raise ArgumentError(
        f"{name} must have the dtype of {owner}'s weights, {weight.dtype}; got {x.dtype}. "
        f"Pass {name}.to({weight.dtype}), or convert the model with model.to({x.dtype})."
    )


def makes_alike(device: torch.device, *dtypes: torch.dtype) -> bool:
    """Whether autocast is on for the device and brings these dtypes to one, as it does all floats but float64."""
    if torch.float64 in dtypes or not all(dtype.is_floating_point for dtype in dtypes):
        return False
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def check_on_grid(x: Tensor, layout: str, *, embed_dim: int, num_axes: int) -> None:
    """Refuse what are no hidden states of tokens on a grid of that many axes.

    Args:
        layout: What the message calls the shape, e.g. "[B, rows, columns, 64]".

    Raises:
        ArgumentError: Unless x is floating point [B, *grid, embed_dim] with no axis of the grid empty.
    """
    check_floating("x", x)
    if x.dim() != num_axes + 2 or x.shape[-1] != embed_dim or 0 in x.shape[1:]:
        raise ArgumentError(f"x must be {layout}; got {list(x.shape)}. Give tokens [B, N, C] as x.unflatten(1, grid).")


def check_images(images: Tensor, weight: Tensor, owner: str) -> None:
    """Refuse what are no images for the first weight, [C_out, C_in, ...], of a module named `owner`.

    Raises:
        ArgumentError: Unless they are floating point [B, C_in, H, W].
    """
    remedy = (
        f"Give one image as images[None], channels last as images.movedim(-1, 1), or build {owner} with in_channels of "
        "your images."
    )
    _check_pixels("images", "H, W", images, weight, remedy)


def check_clips(clips: Tensor, weight: Tensor, owner: str) -> None:
    """Refuse what are no clips for the first weight, [C_out, C_in, ...], of a module named `owner`.

    Raises:
        ArgumentError: Unless they are floating point [B, C_in, T, H, W].
    """
    remedy = (
        f"Give one clip as clips[None], frames first as clips.transpose(1, 2), or build {owner} with in_channels of "
        "your clips."
    )
    _check_pixels("clips", "T, H, W", clips, weight, remedy)


def _check_pixels(name: str, axes: str, pixels: Tensor, weight: Tensor, remedy: str) -> None:
    layout = f"[B, {weight.shape[1]}, {axes}]"
    if not isinstance(pixels, Tensor):
        raise ArgumentError(
            f"{name} must be a tensor {layout}; got {shown(pixels)}. Read files and stack them first, channels before "
            "rows, as floating point from 0 to 1."
        )
    if not pixels.is_floating_point():
        cast = "float()" if weight.dtype == torch.float32 else f"to({weight.dtype})"
        scaled = cast if pixels.dtype == torch.bool else f"{cast} / 255"
        raise ArgumentError(f"{name} must be floating point {layout}; got {shown(pixels)}. Pass {name}.{scaled}.")
    if pixels.dim() != weight.dim() or pixels.shape[1] != weight.shape[1]:
        raise ArgumentError(f"{name} must be floating point {layout}; got {shown(pixels)}. {remedy}")


def shown(value: object) -> str:
    """A value as a message shows it: a tensor by dtype and shape, what has no short text of its own by its type."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    text = repr(value)
    tells = len(text) <= _SHORT and "\n" not in text and " at 0x" not in text
    return text if tells else f"an object of type {type(value).__name__}"


_SHORT = 60  # characters of a value that a message has room for
