"""idx files: plain and packed, and what is no such file."""

import gzip
from pathlib import Path

import pytest
import torch

from transformer_problems.core.errors import ArgumentError, UnknownNameError
from transformer_problems.lab.data.idx_files import load_idx, read_idx


def idx(*shape: int, content: bytes) -> bytes:
    return bytes((0, 0, 8, len(shape))) + b"".join(size.to_bytes(4, "big") for size in shape) + content


def write(folder: Path, split: str, *, packed: bool = False, num_labels: int = 3) -> Path:
    pack, ending = (gzip.compress, ".gz") if packed else (bytes, "")
    images, labels = idx(3, 2, 5, content=bytes(range(30))), idx(num_labels, content=bytes((4, 0, 4, 1))[:num_labels])
    (folder / f"{split}-images-idx3-ubyte{ending}").write_bytes(pack(images))
    (folder / f"{split}-labels-idx1-ubyte{ending}").write_bytes(pack(labels))
    return folder


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("split", "prefix"), [("train", "train"), ("test", "t10k")])
def test_images_and_labels_are_those_of_the_files(split: str, prefix: str, packed: bool, tmp_path: Path) -> None:
    shares: list[float] = []
    images = load_idx(str(write(tmp_path, prefix, packed=packed)), split=split, progress=shares.append)
    assert images.pixels.dtype == torch.uint8
    assert torch.equal(images.pixels, torch.arange(30, dtype=torch.uint8).view(3, 1, 2, 5))
    assert images.classes.tolist() == [4, 0, 4]
    assert images.class_names == ("0", "1", "2", "3", "4")
    assert shares == [0.5, 1.0]


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="path must be an existing folder of idx files; got .*nowhere"):
        load_idx(tmp_path / "nowhere", split="train")
    with pytest.raises(
        ArgumentError, match="must hold train-images-idx3-ubyte or train-images-idx3-ubyte.gz; .* neither"
    ):
        load_idx(tmp_path, split="train")
    (write(tmp_path, "train") / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(ArgumentError, match="must hold train-labels-idx1-ubyte or"):
        load_idx(tmp_path, split="train")
    with pytest.raises(ArgumentError, match="must hold t10k-images-idx3-ubyte or"):
        load_idx(tmp_path, split="test")
    with pytest.raises(UnknownNameError, match="unknown split 'valid'"):
        load_idx(tmp_path, split="valid")  # type: ignore[arg-type]


def test_images_and_labels_must_be_as_many(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="images and labels must be as many; the train files in .* hold 3 and 4"):
        load_idx(write(tmp_path, "train", num_labels=4), split="train")


HOLDS = "must hold the {} bytes that it announces, at least one; it holds {}"
BROKEN = {
    "empty": (b"", "begins with 00000801; it begins with nothing"),
    "zip": (b"PK", "begins with 00000801; it begins with 504b"),
    "images": (idx(1, 1, content=b"x"), "in 1 dimensions, which begins with 00000801; it begins with 00000802"),
    "floats": (b"\0\0\x0d\x01" + idx(1, content=b"wxyz")[4:], "it begins with 00000d01"),
    "cut": (idx(3, content=b"xy"), HOLDS.format(3, 2)),
    "longer": (idx(3, content=b"wxyz"), HOLDS.format(3, 4)),
    "nothing": (idx(0, content=b""), HOLDS.format(0, 0)),
    "no sizes": (b"\0\0\x08\x01\0", HOLDS.format(0, 0)),
    "cut pack": (gzip.compress(idx(3, content=b"xyz"))[:-9], "must be readable, whole if packed; it is not"),
    "bad pack": (gzip.compress(b"")[:10] + b"\xff" * 20, "must be readable, whole if packed; it is not"),
    "no pack": (b"\x1f\x8b", "must be readable, whole if packed; it is not"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_whole_idx_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    content, message = BROKEN[name]
    (tmp_path / "labels").write_bytes(content)
    with pytest.raises(ArgumentError, match=f"labels must be .*{message}|labels {message}"):
        read_idx(tmp_path / "labels", num_dims=1)
