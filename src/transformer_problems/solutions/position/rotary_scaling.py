"""Stretching a rotary embedding so that a model reads further than it was trained."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from transformer_problems.core.arguments import require_multiple_of, require_positive, require_positive_int
from transformer_problems.core.errors import ArgumentError, UnknownNameError
from transformer_problems.core.slots import PositionEncoding
from transformer_problems.solutions.position.rotary import inverse_frequencies, turn

Method = Literal["linear", "ntk", "dynamic_ntk", "yarn"]


class ScaledRotaryEmbedding(PositionEncoding):
    """RotaryEmbedding with lower frequencies, so that positions beyond the trained ones turn by familiar angles.

    - "linear" divides every frequency by `factor`: positions are interpolated, neighbours blur.
    - "ntk" enlarges the base: the lowest frequency is divided by `factor`, the highest is kept.
    - "dynamic_ntk" does so by what the largest position of the call needs, hence not at all within the trained
      length; its keys change with the length, so they cannot be cached.
    - "yarn" keeps features that turn more than `beta_fast` times within the trained length, interpolates those that
      turn less than `beta_slow` times, blends in between, and sharpens the attention.

    Args:
        head_dim: D, even, at least 4.
        factor: How many times further to read; for "dynamic_ntk" 1 is enough and more over-stretches.
        trained_length: Tokens the model was trained on; "linear" and "ntk" do not depend on it.
        base: Longest wavelength over 2 pi of the trained embedding.
        beta_fast: Turns above which YaRN keeps a frequency.
        beta_slow: Turns below which YaRN interpolates a frequency.
        attention_factor: YaRN's multiplier of queries and keys; default 0.1 ln(factor) + 1.

    Shape:
        q: [..., H, N, D]; k: [..., G, M, D]; positions: [..., N] and [..., M]; output: as q and k.

    Raises:
        UnknownNameError: If the method has no such name.
        ArgumentError: If a number is out of range.

    Source:
        linear: Chen et al. 2023, arXiv:2306.15595; ntk, dynamic_ntk, yarn: Peng et al. 2023, arXiv:2309.00071,
        section 3. Differs from the paper: YaRN's blend is linear in the feature's index
        between bounds rounded outwards, as in the authors' code and published models, not in its turns;
        dynamic_ntk stretches by factor * L / trained_length - (factor - 1), as Transformers does, which is the
        paper's L / trained_length at factor 1.
    """

    attends = True

    def __init__(
        self,
        head_dim: int,
        *,
        method: Method,
        factor: float,
        trained_length: int,
        base: float = 10_000.0,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
        attention_factor: float | None = None,
    ) -> None:
        super().__init__()
        require_multiple_of("head_dim", head_dim, 2, "a pair of features")
        require_positive_int(trained_length=trained_length)
        require_positive(beta_slow=beta_slow)
        if method not in get_args(Method):
            raise UnknownNameError("rotary scaling method", method, get_args(Method))
        _require_more("head_dim", head_dim, "2, the size of one pair", 2)
        _require_more("base", base, "1", 1)
        _require_more("beta_fast", beta_fast, f"beta_slow={beta_slow:g}", beta_slow)
        if not factor >= 1:
            raise ArgumentError(f"factor must be at least 1; got {factor}. Use 1 for no scaling.")
        self.head_dim, self.base, self.method, self.factor = head_dim, base, method, factor
        self.trained_length, self.beta_fast, self.beta_slow = trained_length, beta_fast, beta_slow
        self.streams = method != "dynamic_ntk"
        if attention_factor is None:
            attention_factor = 0.1 * math.log(factor) + 1 if method == "yarn" else 1.0
        self.attention_factor = attention_factor
        self.keeps_norms = attention_factor == 1.0

    def rotate(self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor) -> tuple[Tensor, Tensor]:
        frequency = self._frequencies(q.device, q_positions, k_positions)
        return turn(q, k, q_positions, k_positions, frequency, magnitude=self.attention_factor)

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, method={self.method!r}, factor={self.factor:g}, "
            f"trained_length={self.trained_length}, base={self.base:g}"
        )

    def _frequencies(self, device: torch.device, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """Angle per position of each feature pair, [D/2] float32."""
        trained = inverse_frequencies(self.head_dim, self.base, device)
        match self.method:
            case "linear":
                return trained / self.factor
            case "ntk":
                return trained * self._rebase(torch.tensor(self.factor, device=device))
            case "dynamic_ntk":
                least = q_positions.new_full((1,), self.trained_length - 1)  # up to there nothing is stretched
                length = torch.cat([q_positions.flatten(), k_positions.flatten(), least]).max() + 1
                stretch = (self.factor * length / self.trained_length - (self.factor - 1)).clamp(min=1.0)
                return trained * self._rebase(stretch)
            case "yarn":
                kept = self._kept(device)
                return trained * (kept + (1 - kept) / self.factor)

    def _rebase(self, stretch: Tensor) -> Tensor:
        """What base * stretch^(D / (D - 2)) in place of base does to the frequencies, from 1 to 1 / stretch."""
        index = torch.arange(self.head_dim // 2, dtype=torch.float32, device=stretch.device)
        return stretch.float() ** (-2 * index / (self.head_dim - 2))

    def _kept(self, device: torch.device) -> Tensor:
        """YaRN's share of the trained frequency in each pair, 1 for fast ones to 0 for slow ones."""
        first = max(math.floor(self._pair_turning(self.beta_fast)), 0)
        last = min(math.ceil(self._pair_turning(self.beta_slow)), self.head_dim - 1)
        index = torch.arange(self.head_dim // 2, dtype=torch.float32, device=device)
        return 1 - ((index - first) / max(last - first, 1e-3)).clamp(0, 1)

    def _pair_turning(self, turns: float) -> float:
        """The (fractional) index of the feature pair that turns so often within the trained length."""
        return self.head_dim * math.log(self.trained_length / (turns * 2 * math.pi)) / (2 * math.log(self.base))


def _require_more(name: str, value: float, limit_name: str, limit: float) -> None:
    if not value > limit:
        raise ArgumentError(f"{name} must be more than {limit_name}; got {value:g}.")
