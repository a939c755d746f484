"""Folders of wav files: classes by folder or name, padding, length, and what cannot be read."""

import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from transformer_problems.core.errors import ArgumentError, UnknownNameError
from transformer_problems.lab.data.log_mel import log_mel
from transformer_problems.lab.data.wav_file import read_wav
from transformer_problems.lab.data.wav_folder import load_wav_folder

RATE = 8_000


def write(file: Path, frames: bytes, *, rate: int = RATE) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(file), "wb") as opened:
        opened.setparams((1, 2, rate, 0, "NONE", ""))
        opened.writeframes(frames)
    return file


def noise(num_samples: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(-(2**15), 2**15, num_samples, dtype="<i2").tobytes()


def test_classes_are_the_sub_folders_and_sequences_are_padded(tmp_path: Path) -> None:
    write(tmp_path / "yes" / "b.wav", noise(1_000))
    write(tmp_path / "yes" / "a.WAV", noise(250, seed=1))
    write(tmp_path / "no" / "c.wav", noise(600, seed=2))
    shares: list[float] = []
    sounds = load_wav_folder(tmp_path, progress=shares.append)
    assert sounds.class_names == ("no", "yes")
    assert sounds.classes.tolist() == [0, 1, 1]
    assert sounds.key_mask.sum(dim=1).tolist() == [6, 1, 11]
    assert sounds.features.shape == (3, 11, 40)
    for row, file in enumerate(("no/c.wav", "yes/a.WAV", "yes/b.wav")):
        mine = sounds.features[row, sounds.key_mask[row]]
        torch.testing.assert_close(mine, log_mel(read_wav(tmp_path / file).waveform, RATE), atol=0, rtol=0)
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


@pytest.mark.parametrize("max_seconds", [0.25, 0.5])
def test_of_longer_recordings_the_beginning_is_read(max_seconds: float, tmp_path: Path) -> None:
    for name, num in (("a/exact", RATE // 2), ("a/long", RATE), ("b/longer", 3 * RATE)):
        write(tmp_path / f"{name}.wav", noise(num))
    limit = int(max_seconds * RATE)
    first = r"exact.wav \(0.5 s\)" if max_seconds < 0.5 else r"long.wav \(1.0 s\)"
    num_cut = 3 if max_seconds < 0.5 else 2
    with pytest.warns(
        UserWarning, match=rf"^{num_cut} recordings of .* cut to their first {max_seconds} s, first .*{first}"
    ):
        sounds = load_wav_folder(tmp_path, max_seconds=max_seconds)
    assert (sounds.num_cut, sounds.num_skipped) == (num_cut, 0)
    expected = log_mel(read_wav(tmp_path / "b" / "longer.wav").waveform[:limit], RATE)
    torch.testing.assert_close(sounds.features[2], expected, atol=0, rtol=0)
    with pytest.raises(ArgumentError, match=rf"recordings must last {max_seconds} s at most .*{first[:9]}.* Cut it"):
        load_wav_folder(tmp_path, max_seconds=max_seconds, strict=True)


def test_half_a_minute_is_read_unless_said_otherwise(tmp_path: Path) -> None:
    for name, seconds in (("a/short", 1), ("b/whole", 30), ("b/long", 31)):
        write(tmp_path / f"{name}.wav", noise(seconds * RATE))
    with pytest.warns(UserWarning, match=r"^1 recordings of .* cut to their first 30 s, first .*long.wav \(31.0 s\)"):
        sounds = load_wav_folder(str(tmp_path))  # a path may be text
    assert sounds.num_cut == 1
    assert sounds.features.shape[1] == 1 + (30_000 - 25) // 10  # windows of 25 ms every 10 ms
    with pytest.raises(ArgumentError, match="max_seconds must be positive; got 0"):
        load_wav_folder(tmp_path, max_seconds=0)


def test_other_files_and_folders_are_counted_or_refused(tmp_path: Path) -> None:
    for name in ("a/x", "b/y", "stray", "7_x"):
        write(tmp_path / f"{name}.wav", noise(300))
    (tmp_path / "a" / "x.mp3").write_bytes(b"no wav")
    with pytest.warns(UserWarning, match=r"^3 files or folders of .* no .wav files to be read, first .*7_x.wav"):
        assert load_wav_folder(tmp_path).num_skipped == 3
    with pytest.raises(ArgumentError, match=r"nothing else where that is strict; .*7_x.wav .in no class's folder"):
        load_wav_folder(tmp_path, strict=True)
    (tmp_path / "stray.wav").rename(tmp_path / "8_y.mp3")
    with pytest.warns(UserWarning, match=r"^3 files or folders of .* first .*a \(a folder\)"):
        assert load_wav_folder(tmp_path, class_from="prefix").num_skipped == 3
    with pytest.raises(ArgumentError, match=r"a \(a folder\) is among 3 that would be left out"):
        load_wav_folder(tmp_path, class_from="prefix", strict=True)


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
