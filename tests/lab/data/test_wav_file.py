"""wav files: sample formats plain and extensible, lengths, and what cannot be read."""

import struct
import tracemalloc
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import wavfile

from transformer_problems.core.errors import ArgumentError
from transformer_problems.lab.data.wav_file import read_wav

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
    recording = read_wav(write(tmp_path / "x.wav", frames, width=width))
    assert recording.sample_rate == RATE
    assert recording.waveform.dtype == torch.float32
    torch.testing.assert_close(recording.waveform, torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0 - 1 / half]))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32"])
def test_equals_scipy(dtype: str, tmp_path: Path) -> None:
    limits = np.iinfo(dtype)
    samples = np.random.default_rng(0).integers(limits.min, limits.max, 997, dtype=dtype, endpoint=True)
    wavfile.write(tmp_path / "x.wav", RATE, samples)
    recording = read_wav(tmp_path / "x.wav")
    middle = 128 if dtype == "uint8" else 0
    expected = (samples.astype(np.float64) - middle) / (limits.max - middle + 1)
    assert recording.sample_rate == RATE
    torch.testing.assert_close(recording.waveform, torch.from_numpy(expected).float(), atol=0, rtol=0)


def test_channels_are_averaged(tmp_path: Path) -> None:
    both = np.array([[8192, 16384], [-8192, 8192]], dtype="<i2")
    recording = read_wav(write(tmp_path / "x.wav", both.tobytes(), num_channels=2))
    assert recording.waveform.tolist() == [0.375, 0.0]


def riff(*parts: tuple[bytes, bytes]) -> bytes:
    """A file of named parts; those of odd length are padded."""
    body = b"".join(name + len(part).to_bytes(4, "little") + part + b"\0" * (len(part) % 2) for name, part in parts)
    return b"RIFF" + (4 + len(body)).to_bytes(4, "little") + b"WAVE" + body


def written(
    *, number: int = 1, bits: int = 16, num_channels: int = 1, rate: int = RATE, frame: int | None = None
) -> bytes:
    """The part that says how samples are written, in the plain form."""
    frame = num_channels * bits // 8 if frame is None else frame
    return struct.pack("<HHIIHH", number, num_channels, rate, rate * frame, frame, bits)


def extensible(*, number: int = 1, bits: int = 16, num_channels: int = 1, ending: str = "8000-00aa00389b71") -> bytes:
    """As `written`, in the extensible form: 22 bytes more, the last of which identify the format."""
    plain = written(number=0xFFFE, bits=bits, num_channels=num_channels)
    identifier = struct.pack("<IHH", number, 0, 0x10) + bytes.fromhex(ending.replace("-", ""))
    return plain + struct.pack("<HHI", 22, bits, 0) + identifier


@pytest.mark.parametrize("num_channels", [1, 2])
@pytest.mark.parametrize("bits", [16, 24, 32])
def test_the_extensible_form_equals_the_plain_one_and_scipy(bits: int, num_channels: int, tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, 97 * num_channels * bits // 8, dtype=np.uint8).tobytes()
    file = tmp_path / "x.wav"
    file.write_bytes(riff((b"fmt ", extensible(bits=bits, num_channels=num_channels)), (b"data", frames)))
    found = read_wav(file)
    plain = read_wav(write(tmp_path / "y.wav", frames, width=bits // 8, num_channels=num_channels))
    assert torch.equal(found.waveform, plain.waveform)
    rate, samples = wavfile.read(file)  # 24 bits stand in the upper bytes of 32
    assert found.sample_rate == rate == RATE
    theirs = samples.reshape(97, num_channels) / -float(np.iinfo(samples.dtype).min)
    torch.testing.assert_close(found.waveform, torch.from_numpy(theirs.mean(axis=1)).float(), atol=0, rtol=0)


def test_other_parts_of_a_file_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "x.wav").write_bytes(
        riff((b"LIST", b"odd"), (b"fmt ", written()), (b"fact", b"1234"), (b"data", noise(50)), (b"id3 ", b"tail"))
    )
    assert torch.equal(read_wav(tmp_path / "x.wav").waveform, read_wav(write(tmp_path / "y.wav", noise(50))).waveform)


@pytest.mark.parametrize(("max_seconds", "num_samples"), [(1e-9, 1), (0.1, 800), (0.125, 1_000), (9.0, 1_000)])
def test_no_more_is_read_than_asked_for(max_seconds: float, num_samples: int, tmp_path: Path) -> None:
    file = write(tmp_path / "x.wav", noise(1_000))
    found = read_wav(str(file), max_seconds=max_seconds)  # a path may be text
    assert torch.equal(found.waveform, read_wav(file).waveform[:num_samples])
    assert found.duration_s == 0.125


def test_hours_of_sound_take_no_more_memory_than_what_is_asked_for(tmp_path: Path) -> None:
    file, num_bytes = tmp_path / "x.wav", 2**31
    head = riff((b"fmt ", written()), (b"data", b""))[:-4]
    file.write_bytes(head + num_bytes.to_bytes(4, "little"))
    with file.open("r+b") as opened:
        opened.truncate(len(head) + 4 + num_bytes)  # a hole, which takes no room on the disk
    tracemalloc.start()
    found = read_wav(file, max_seconds=2.0)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.waveform) == 2 * RATE
    assert found.duration_s == num_bytes / 2 / RATE
    assert peak_bytes < 100 * 2 * RATE  # some numbers of 8 bytes for each sample


def test_files_that_are_no_whole_pcm_wav_are_refused_by_name(tmp_path: Path) -> None:
    whole, sound = write(tmp_path / "x.wav", noise(300)).read_bytes(), (b"data", noise(300))
    broken = {
        "empty": (b"", "it is empty"),
        "text": (b"once upon a time there was a sound", "it begins with b'once upon a ' and not as a wav file"),
        "big": (b"RIFX" + whole[4:], "it begins with b'RIFX.* and not as a wav file"),
        "headless": (riff(sound, (b"fmt ", written())), "its samples come before their format"),
        "soundless": (riff((b"fmt ", written())), "it ends before its samples"),
        "formless": (riff((b"fmt ", written()[:14]), sound), "its format is cut off"),
        "cut": (whole[:-100], "must hold the 300 frames that it announces, at least one; it holds 250"),
        "odd": (whole[:-99], "must hold the 300 frames"),
        "wide": (riff((b"fmt ", written(bits=64)), sound), "its samples have 64 bits"),
        "thin": (riff((b"fmt ", written(bits=0)), sound), "its samples have 0 bits"),
        "loose": (riff((b"fmt ", written(bits=24, frame=4)), sound), "1 channels of 24 bits do not take the 4 bytes"),
        "mute": (riff((b"fmt ", written(num_channels=0)), sound), "0 channels of 16 bits do not take the 0 bytes"),
        "still": (riff((b"fmt ", written(rate=0)), sound), "it announces 0 samples a second, not 1 to"),
        "fast": (riff((b"fmt ", written(rate=10**9)), sound), "it announces 1000000000 samples a second"),
        "float": (riff((b"fmt ", written(number=3, bits=32)), sound), "it holds floats of 32 bits, not whole numbers"),
        "floats": (riff((b"fmt ", extensible(number=3, bits=32)), sound), "it holds floats of 32 bits, not whole"),
        "mulaw": (riff((b"fmt ", written(number=7, bits=8)), sound), "it holds samples of format 0x0007"),
        "other": (riff((b"fmt ", extensible(ending="8000-00aa00389b72")), sound), "it holds samples of format 0xfffe"),
    }
    for name, (content, message) in broken.items():
        (tmp_path / f"{name}.wav").write_bytes(content)
        with pytest.raises(ArgumentError, match=rf"{name}.wav .*{message}") as caught:
            read_wav(tmp_path / f"{name}.wav")
        assert "\n" not in str(caught.value)
    with pytest.raises(ArgumentError, match="silent.wav must hold the 0 frames that it announces, at least one"):
        read_wav(write(tmp_path / "silent.wav", b""))
    with pytest.raises(ArgumentError, match=r"nowhere.wav must be a PCM wav file"):
        read_wav(tmp_path / "nowhere.wav")


def test_floats_are_refused_with_what_to_do(tmp_path: Path) -> None:
    wavfile.write(tmp_path / "float.wav", RATE, np.zeros(300, dtype=np.float32))
    remedy = r"floats of 32 bits, not whole numbers. Convert it, as `ffmpeg -i float.wav -c:a pcm_s16le new.wav` does"
    with pytest.raises(ArgumentError, match=remedy):
        read_wav(tmp_path / "float.wav")


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
            outcomes.add(read_wav(file).waveform.isfinite().all().item())
        except ArgumentError:
            outcomes.add("refused")
    assert outcomes == {True, "refused"}
