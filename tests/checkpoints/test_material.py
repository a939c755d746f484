"""The user's texts and images are read whole, or refused in one line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from transformer_problems.checkpoints.material import machines_images, machines_texts, own_images, own_texts
from transformer_problems.core.errors import ArgumentError

LINE = "a line of text that is long enough\n"


def test_each_line_of_a_file_is_a_text(tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("\ufeff" + LINE * 20 + "\n\n" + LINE * 20, encoding="utf-8")
    found = own_texts(file)
    assert found.own
    assert found.texts == (LINE.strip(),) * 40


def test_each_file_of_a_folder_is_a_text(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text(LINE * 30)
    (tmp_path / "a.txt").write_text(LINE * 10)
    (tmp_path / ".hidden").write_bytes(b"\0")
    assert own_texts(tmp_path).texts == (LINE * 10, LINE * 30)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"\x7fELF\0\0", "is binary"),
        ("caf\xe9 ".encode("latin-1") * 500, "must be UTF-8"),
        ("text ".encode("utf-16") * 500, "is binary"),
        (b"too short", "1,000 characters"),
    ],
)
def test_data_that_is_no_text(tmp_path: Path, content: bytes, told: str) -> None:
    file = tmp_path / "data"
    file.write_bytes(content)
    for path in (file, tmp_path):
        with pytest.raises(ArgumentError, match=told) as caught:
            own_texts(path)
        assert "\n" not in str(caught.value)


def test_data_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="existing"):
        own_texts(tmp_path / "none")
    with pytest.raises(ArgumentError, match="holds none"):
        own_texts(tmp_path)
    with pytest.raises(ArgumentError, match="folder of images"):
        own_images(tmp_path / "none")


@pytest.mark.parametrize("folder", ["cats", "."])
def test_images_of_a_folder(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    Image.fromarray(np.full((40, 60, 3), 255, dtype=np.uint8)).save(tmp_path / folder / "a.png")
    found = own_images(tmp_path).images
    assert found is not None
    assert found.shape[:2] == (1, 3)
    assert torch.equal(found, torch.ones_like(found))


def test_what_every_machine_has() -> None:
    assert sum(map(len, machines_texts().texts)) > 100_000
    images = machines_images().images
    assert images is not None
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    assert torch.equal(images, machines_images().images)
