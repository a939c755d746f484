"""Log-mel features against the formula, frame by frame, and transformers' own."""

import math

import pytest
import torch

from transformer_problems.core.errors import ArgumentError
from transformer_problems.lab.data.log_mel import NUM_BANDS, log_mel


def tone(frequency: float, rate: int, num_samples: int) -> torch.Tensor:
    return torch.sin(2 * math.pi * frequency * torch.arange(num_samples, dtype=torch.float64) / rate)


def naive(waveform: torch.Tensor, rate: int) -> torch.Tensor:
    length, hop = round(0.025 * rate), round(0.01 * rate)
    index = torch.arange(length, dtype=torch.float64)
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * index / length)
    waves = torch.exp(-2j * math.pi * torch.outer(torch.arange(length // 2 + 1, dtype=torch.float64), index) / length)
    mel_edges = [i / (NUM_BANDS + 1) * 2595 * math.log10(1 + rate / 2 / 700) for i in range(NUM_BANDS + 2)]
    edges = [700 * (10 ** (m / 2595) - 1) for m in mel_edges]
    frames = []
    for start in range(0, len(waveform) - length + 1, hop):
        power = (waves @ (waveform[start : start + length] * window).to(waves.dtype)).abs() ** 2
        bands = []
        for low, centre, high in zip(edges, edges[1:], edges[2:], strict=False):
            total = 0.0
            for k, p in enumerate(power.tolist()):
                f = k * rate / length
                total += p * max(0.0, min((f - low) / (centre - low), (high - f) / (high - centre)))
            bands.append(math.log(max(total, 1e-10)))
        frames.append(bands)
    return torch.tensor(frames, dtype=torch.float64)


@pytest.mark.parametrize(("rate", "num_samples"), [(8_000, 200), (8_000, 1_001), (16_000, 2_003), (44_100, 3_000)])
def test_equals_the_formula(rate: int, num_samples: int) -> None:
    waveform = torch.randn(num_samples, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # float64 sums of a thousand terms; where power nearly cancels, the logarithm keeps fewer digits
    torch.testing.assert_close(log_mel(waveform, rate), naive(waveform, rate), atol=1e-9, rtol=0)


@pytest.mark.peer
@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_equals_transformers(rate: int) -> None:
    audio = pytest.importorskip("transformers.audio_utils")
    waveform = torch.randn(rate // 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    length, hop = round(0.025 * rate), round(0.01 * rate)
    filters = audio.mel_filter_bank(length // 2 + 1, NUM_BANDS, 0.0, rate / 2, rate, norm=None, mel_scale="htk")
    theirs = audio.spectrogram(
        waveform.numpy(),
        audio.window_function(length, "hann"),
        frame_length=length,
        hop_length=hop,
        power=2.0,
        center=False,
        mel_filters=filters,
        log_mel="log",
        mel_floor=1e-10,
    )
    # transformers rounds the spectrum to complex64
    torch.testing.assert_close(log_mel(waveform, rate), torch.from_numpy(theirs.T).double(), atol=1e-4, rtol=0)


def test_a_tone_is_loudest_in_its_band_and_grows_with_its_power() -> None:
    rate = 16_000
    loudest = [int(log_mel(tone(f, rate, 4_000), rate).mean(dim=0).argmax()) for f in (200.0, 1_000.0, 3_000.0)]
    mel = [2595 * math.log10(1 + f / 700) for f in (200.0, 1_000.0, 3_000.0)]
    step = 2595 * math.log10(1 + 8_000 / 700) / (NUM_BANDS + 1)
    assert loudest == [round(m / step) - 1 for m in mel]
    loud, soft = (log_mel(a * tone(1_000.0, rate, 4_000), rate)[:, loudest[1]] for a in (1.0, 0.1))
    torch.testing.assert_close(loud - soft, torch.full_like(loud, math.log(100)))  # power is the square


@pytest.mark.parametrize(
    ("num_samples", "num_frames"), [(1, 1), (63, 1), (64, 1), (200, 1), (279, 1), (280, 2), (8_000, 98)]
)
def test_frames_are_the_windows_that_end_within_the_sound_at_least_one(num_samples: int, num_frames: int) -> None:
    assert log_mel(torch.ones(num_samples), 8_000).shape == (num_frames, NUM_BANDS)


def test_silence_is_finite() -> None:
    torch.testing.assert_close(log_mel(torch.zeros(400), 8_000), torch.full((3, NUM_BANDS), math.log(1e-10)))


def test_sounds_without_features_are_refused() -> None:
    with pytest.raises(ArgumentError, match="waveform must hold at least one sample; got none"):
        log_mel(torch.zeros(0), 8_000)
    with pytest.raises(ArgumentError, match=r"floating point \[samples\] of one channel; got .* \[2, 400\]. Average"):
        log_mel(torch.zeros(2, 400), 8_000)
    with pytest.raises(ArgumentError, match=r"of one channel; got torch.int16 \[400\]. .* divide whole numbers"):
        log_mel(torch.zeros(400, dtype=torch.int16), 8_000)
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(
            ArgumentError, match="must hold finite numbers; got 1 that are not, among 400 samples. Read"
        ):
            log_mel(torch.cat([torch.zeros(399), torch.tensor([bad])]), 8_000)
    with pytest.raises(ArgumentError, match=r"sample_rate must be high enough .* got 1000. Use recordings of 8000"):
        log_mel(torch.zeros(100), 1_000)
    with pytest.raises(ArgumentError, match="sample_rate must be positive; got 0"):
        log_mel(torch.zeros(100), 0)
