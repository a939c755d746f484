"""Log-mel features: what a short stretch of sound holds in bands that widen with pitch, as hearing does."""

import torch
from torch import Tensor

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import ArgumentError

NUM_BANDS = 40
WINDOW_S, HOP_S = 0.025, 0.010
_FLOOR = 1e-10  # power, below that of the rounding of 16-bit samples, so that digital silence has a logarithm


def log_mel(waveform: Tensor, sample_rate: int) -> Tensor:
    """Logarithm of the power in 40 bands, in windows of 25 ms every 10 ms.

    Hann windows, of which those that end within the sound are taken, at least one; triangular bands, equally wide on
    the mel scale m = 2595 log10(1 + f / 700), from 0 to half the sample rate.

    Args:
        sample_rate: Samples a second.

    Shape:
        waveform: [samples] from -1 to 1; output: [N, 40].

    Raises:
        ArgumentError: If the sound is empty, has several channels or holds what is no finite number, or the rate is
            too low for so many bands.

    Source:
        Davis and Mermelstein 1980, IEEE Transactions on Acoustics, Speech, and Signal Processing 28 (mel filters);
        O'Shaughnessy 1987, Speech Communication (the scale).
    """
    require_positive_int(sample_rate=sample_rate)
    _check_waveform(waveform)
    window_len, hop_len = round(WINDOW_S * sample_rate), round(HOP_S * sample_rate)
    bands = _mel_bands(window_len // 2 + 1, sample_rate).to(waveform)
    missing = max(0, window_len - len(waveform))
    spectrum = torch.stft(
        torch.nn.functional.pad(waveform, (0, missing)),
        n_fft=window_len,
        hop_length=hop_len,
        window=torch.hann_window(window_len, dtype=waveform.dtype, device=waveform.device),
        center=False,
        return_complex=True,
    )
    power = spectrum.abs().square()  # [bins, N]
    return (bands @ power).clamp(min=_FLOOR).log().T


def _check_waveform(waveform: Tensor) -> None:
    if waveform.dim() != 1 or not waveform.is_floating_point():
        raise ArgumentError(
            f"waveform must be floating point [samples] of one channel; got {waveform.dtype} {list(waveform.shape)}. "
            "Average channels, and divide whole numbers by the largest of their kind."
        )
    if len(waveform) == 0:
        raise ArgumentError("waveform must hold at least one sample; got none. Leave empty sounds out.")
    if num_bad := int((~waveform.isfinite()).sum()):
        raise ArgumentError(
            f"waveform must hold finite numbers; got {num_bad} that are not, among {len(waveform)} samples. Read the "
            "sound again, or replace them by zeros."
        )


def _mel_bands(num_bins: int, sample_rate: int) -> Tensor:
    """Weights of the bins of a spectrum in each band, [40, bins] float64."""
    top = 2595 * torch.log10(torch.tensor(1 + sample_rate / 2 / 700, dtype=torch.float64))
    edges = 700 * (10 ** (torch.linspace(0, 1, NUM_BANDS + 2, dtype=torch.float64) * top / 2595) - 1)
    bins = torch.linspace(0, sample_rate / 2, num_bins, dtype=torch.float64)
    low, centre, high = (edges[i : NUM_BANDS + i, None] for i in range(3))
    bands = torch.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)).clamp(min=0)
    if not bands.any(dim=1).all():
        raise ArgumentError(
            f"sample_rate must be high enough that each of {NUM_BANDS} mel bands holds a bin of the spectrum; got "
            f"{sample_rate}. Use recordings of 8000 samples a second or more."
        )
    return bands
