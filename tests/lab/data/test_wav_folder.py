"""Folders of wav files: sample formats, classes by folder or name, padding, and what cannot be read."""

import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import wavfile

from transformer_problems.core.errors import ArgumentError, UnknownNameError
from transformer_problems.lab.data.log_mel import log_mel
from transformer_problems.lab.data.wav_folder import load_wav_folder, read_wav

RATE = 8_000


def write(file: Path, frames: bytes, *, width: int = 2, num_channels: int = 1, rate: int = RATE) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(file), "wb") as opened:
        opened.setnchannels(num_channels)
        opened.setsampwidth(width)
        opened.setframerate(rate)
        opened.writeframes(frames)
    return file


def noise(num_samples: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(-(2**15), 2**15, num_samples, dtype="<i2").tobytes()


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_every_width_spans_minus_one_to_one(width: int, tmp_path: Path) -> None:
    half = 1 << (8 * width - 1)
    levels = [-half, -half // 2, 0, half // 2, half - 1]
    offset = half if width == 1 else 0  # samples of 8 bits are unsigned
    frames = b"".join((x + offset).to_bytes(width, "little", signed=width > 1) for x in levels)
    waveform, rate = read_wav(write(tmp_path / "x.wav", frames, width=width))
    assert rate == RATE
    assert waveform.dtype == torch.float32
    torch.testing.assert_close(waveform, torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0 - 1 / half]))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32"])
def test_equals_scipy(dtype: str, tmp_path: Path) -> None:
    limits = np.iinfo(dtype)
    samples = np.random.default_rng(0).integers(limits.min, limits.max, 997, dtype=dtype, endpoint=True)
    wavfile.write(tmp_path / "x.wav", RATE, samples)
    waveform, rate = read_wav(tmp_path / "x.wav")
    middle = 128 if dtype == "uint8" else 0
    expected = (samples.astype(np.float64) - middle) / (limits.max - middle + 1)
    assert rate == RATE
    torch.testing.assert_close(waveform, torch.from_numpy(expected).float(), atol=0, rtol=0)


def test_channels_are_averaged(tmp_path: Path) -> None:
    both = np.array([[8192, 16384], [-8192, 8192]], dtype="<i2")
    waveform, _ = read_wav(write(tmp_path / "x.wav", both.tobytes(), num_channels=2))
    assert waveform.tolist() == [0.375, 0.0]


def test_classes_are_the_sub_folders_and_sequences_are_padded(tmp_path: Path) -> None:
    write(tmp_path / "yes" / "b.wav", noise(1_000))
    write(tmp_path / "yes" / "a.WAV", noise(250, seed=1))
    write(tmp_path / "no" / "c.wav", noise(600, seed=2))
    write(tmp_path / "stray.wav", noise(900))
    shares: list[float] = []
    sounds = load_wav_folder(tmp_path, progress=shares.append)
    assert sounds.class_names == ("no", "yes")
    assert sounds.classes.tolist() == [0, 1, 1]
    assert sounds.key_mask.sum(dim=1).tolist() == [6, 1, 11]
    assert sounds.features.shape == (3, 11, 40)
    for row, file in enumerate(("no/c.wav", "yes/a.WAV", "yes/b.wav")):
        mine = sounds.features[row, sounds.key_mask[row]]
        torch.testing.assert_close(mine, log_mel(*read_wav(tmp_path / file)), atol=0, rtol=0)
    assert (sounds.features[~sounds.key_mask] == 0).all()
    assert shares == [1 / 3, 2 / 3, 1.0]


def test_classes_are_the_beginnings_of_names(tmp_path: Path) -> None:
    for name in ("7_jackson_0", "7_theo_1", "10-theo", "1_theo_0"):
        write(tmp_path / f"{name}.wav", noise(300))
    sounds = load_wav_folder(tmp_path, class_from="prefix")
    assert sounds.class_names == ("1", "10", "7")
    assert sounds.classes.tolist() == [0, 1, 2, 2]
    write(tmp_path / "hello.wav", noise(300))
    with pytest.raises(ArgumentError, match=r"file names must begin with a class and '_' or '-', .*hello.wav does not"):
        load_wav_folder(tmp_path, class_from="prefix")


def test_one_sample_rate_is_required(tmp_path: Path) -> None:
    write(tmp_path / "a" / "x.wav", noise(300))
    write(tmp_path / "b" / "y.wav", noise(600), rate=16_000)
    with pytest.raises(ArgumentError, match=r"one sample rate; .*x.wav has 8000 and .*y.wav has 16000. Resample"):
        load_wav_folder(tmp_path)


def test_files_that_are_no_whole_pcm_wav_are_refused_by_name(tmp_path: Path) -> None:
    whole = write(tmp_path / "x.wav", noise(300)).read_bytes()
    broken = {
        "empty": (b"", "cannot be read as one .it ends too early"),
        "text": (b"once upon a time there was a sound", "cannot be read as one"),
        "cut": (whole[:-100], "must hold the 300 frames that it announces, at least one; it holds 250"),
        "odd": (whole[:-99], "must hold the 300 frames"),
        "wide": (whole[:32] + bytes((8, 0, 64, 0)) + whole[36:], "must have samples of 8 to 32 bits; it has 64"),
    }
    for name, (content, message) in broken.items():
        (tmp_path / f"{name}.wav").write_bytes(content)
        with pytest.raises(ArgumentError, match=rf"{name}.wav .*{message}"):
            read_wav(tmp_path / f"{name}.wav")
    with pytest.raises(ArgumentError, match="silent.wav must hold the 0 frames that it announces, at least one"):
        read_wav(write(tmp_path / "silent.wav", b""))
    wavfile.write(tmp_path / "float.wav", RATE, np.zeros(300, dtype=np.float32))
    with pytest.raises(ArgumentError, match=r"float.wav must be a PCM wav .*unknown format: 3.* Convert or remove it"):
        read_wav(tmp_path / "float.wav")
    with pytest.raises(ArgumentError, match=r"nowhere.wav must be a PCM wav file"):
        read_wav(tmp_path / "nowhere.wav")


def test_damage_anywhere_is_one_clear_line(tmp_path: Path) -> None:
    """Whatever bytes of the header change, the file is read or refused: nothing else is raised."""
    rng = np.random.default_rng(0)
    content, file = write(tmp_path / "x.wav", noise(300)).read_bytes(), tmp_path / "y.wav"
    outcomes = set()
    for _ in range(1_000):
        damaged = bytearray(content)
        for place in rng.integers(0, 44, 3):
            damaged[place] = rng.integers(0, 256)
        file.write_bytes(damaged)
        try:
            waveform, _ = read_wav(file)
            outcomes.add(waveform.isfinite().all().item())
        except ArgumentError:
            outcomes.add("refused")
    assert outcomes == {True, "refused"}


def test_unreadable_recordings_are_left_out_and_counted_or_refused(tmp_path: Path) -> None:
    for name in ("a/x", "a/y", "b/z"):
        write(tmp_path / f"{name}.wav", noise(300))
    (tmp_path / "a" / "a.wav").write_bytes(b"no sound")
    shares: list[float] = []
    with pytest.warns(UserWarning, match=r"^1 unreadable recordings of .* left out, first .*a.wav \(.*PCM wav file"):
        sounds = load_wav_folder(tmp_path, progress=shares.append)
    assert sounds.num_skipped == 1 and sounds.classes.tolist() == [0, 0, 1] and shares[-1] == 1
    with pytest.raises(ArgumentError, match=r"a.wav must be a PCM wav file"):
        load_wav_folder(tmp_path, strict=True)
    (tmp_path / "b" / "z.wav").write_bytes(b"")
    with pytest.raises(ArgumentError, match=r"b has none, of 2 unreadable recordings"):
        load_wav_folder(tmp_path)


def test_folders_without_sounds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="path must be an existing folder; got .*nowhere"):
        load_wav_folder(tmp_path / "nowhere")
    with pytest.raises(ArgumentError, match="path must be an existing folder; got .*nowhere"):
        load_wav_folder(tmp_path / "nowhere", class_from="prefix")
    with pytest.raises(ArgumentError, match="path must hold a sub-folder for each class"):
        load_wav_folder(tmp_path)
    with pytest.raises(ArgumentError, match="path must hold wav files; .* holds none"):
        load_wav_folder(tmp_path, class_from="prefix")
    (tmp_path / "yes").mkdir()
    with pytest.raises(ArgumentError, match="must hold .wav files; .*yes holds none"):
        load_wav_folder(tmp_path)
    with pytest.raises(UnknownNameError, match="unknown source of the classes 'suffix'"):
        load_wav_folder(tmp_path, class_from="suffix")  # type: ignore[arg-type]
