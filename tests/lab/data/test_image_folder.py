"""Folders of images: classes, order, scaling, and what cannot be read."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from transformer_problems.core.errors import ArgumentError
from transformer_problems.lab.data.image_folder import load_image_folder


def draw_image(file: Path, colour: tuple[int, int, int], size: tuple[int, int] = (6, 6)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw_image(tmp_path / "dog" / "b.png", (0, 0, 200))
    draw_image(tmp_path / "cat" / "two.PNG", (0, 200, 0))
    draw_image(tmp_path / "cat" / "deep" / "one.png", (200, 0, 0))
    draw_image(tmp_path / "dog" / ".hidden.png", (9, 9, 9))
    draw_image(tmp_path / ".trash" / "x.png", (9, 9, 9))
    return tmp_path


def test_classes_are_the_sub_folders_by_name(folder: Path) -> None:
    shares: list[float] = []
    images = load_image_folder(str(folder), size=4, progress=shares.append)  # a path may be text
    assert images.class_names == ("cat", "dog")
    assert images.classes.tolist() == [0, 0, 1]
    assert images.pixels.shape == (3, 3, 4, 4)
    assert images.pixels.dtype == torch.uint8
    assert [image.amax(dim=(1, 2)).tolist() for image in images.pixels] == [[200, 0, 0], [0, 200, 0], [0, 0, 200]]
    assert images.num_skipped == 0
    assert shares == [1 / 3, 2 / 3, 1.0]


def test_pixels_are_those_of_the_file(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "x.png")
    read = load_image_folder(tmp_path, size=5).pixels[0]
    assert torch.equal(read, torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize("size", [(12, 4), (4, 12)])
def test_other_shapes_are_cropped_to_their_middle_and_not_bent(size: tuple[int, int], tmp_path: Path) -> None:
    width, height = size
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[height // 2 - 2 : height // 2 + 2, width // 2 - 2 : width // 2 + 2] = 255
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "x.png")
    assert (load_image_folder(tmp_path, size=4).pixels == 255).all()


def test_photographs_stand_upright(tmp_path: Path) -> None:
    lying = Image.new("RGB", (8, 8))
    lying.paste((255, 255, 255), (0, 0, 4, 8))  # white on the left
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: turn by 90 degrees clockwise to see it upright
    (tmp_path / "a").mkdir()
    lying.save(tmp_path / "a" / "x.jpeg", exif=turned)
    rows = load_image_folder(tmp_path, size=8).pixels[0, 0].float().mean(dim=1)
    assert rows[:3].min() > 200 > 50 > rows[5:].max()  # white on top; JPEG blurs the edge


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK"])
def test_grey_and_other_modes_become_colours(mode: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    name = "x.jpg" if mode == "CMYK" else "x.png"
    Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode).save(tmp_path / "a" / name)
    images = load_image_folder(tmp_path, size=4)
    assert images.pixels.shape == (1, 3, 4, 4)
    assert (images.pixels == 255).all()


def left_out_and_refused(folder: Path, message: str, num: int) -> None:
    with pytest.warns(UserWarning, match=rf"^{num} files or folders of .* left out .* first {message}") as caught:
        images = load_image_folder(folder, size=4)
    assert len(caught) == 1
    assert (images.num_skipped, images.classes.tolist()) == (num, [0, 0, 1])
    with pytest.raises(ArgumentError, match=rf"{message} is among {num} that would be left out. Move it away"):
        load_image_folder(folder, size=4, strict=True)


def test_files_of_other_types_or_no_class_are_counted_or_refused(folder: Path) -> None:
    (folder / "dog" / "notes.txt").write_text("no image")
    left_out_and_refused(folder, r".*notes.txt \(of another type\)", 1)
    draw_image(folder / "stray.png", (9, 9, 9))
    (folder / "cat" / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "cat" / "again").symlink_to(folder / "dog")
    left_out_and_refused(folder, r".*stray.png \(in no class's folder\)", 4)
    (folder / "stray.png").unlink()
    left_out_and_refused(folder, r".*again \(a link to a folder\)", 3)
    (folder / "cat" / "again").unlink()
    left_out_and_refused(folder, r".*gone.png \(no file that exists\)", 2)


def refuse_to_list(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """As for a user without the right to; this one may have every right."""
    whole = os.scandir

    def scandir(path: Path):
        if path == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path)

    patch.setattr(os, "scandir", scandir)


def test_folders_that_cannot_be_listed_are_counted_or_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_image(folder / "cat" / "locked" / "x.png", (1, 2, 3))
    refuse_to_list(monkeypatch, folder / "cat" / "locked")
    left_out_and_refused(folder, r".*locked \(cannot be listed: Permission denied\)", 1)
    refuse_to_list(monkeypatch, folder / "dog")
    reason = r"dog holds none, but .*dog \(cannot be listed: Permission denied\). Add some or remove it"
    with pytest.raises(ArgumentError, match=reason):
        load_image_folder(folder, size=4)


def damage(folder: Path) -> None:
    whole = (folder / "dog" / "b.png").read_bytes()
    (folder / "dog" / "a.png").write_bytes(whole[: len(whole) // 2])
    (folder / "cat" / "text.jpg").write_text("no image at all")
    Image.fromarray(np.full((4, 4), 4000, dtype=np.uint16)).save(folder / "cat" / "deep.png")


def test_unreadable_images_are_left_out_and_counted(folder: Path) -> None:
    damage(folder)
    shares: list[float] = []
    with pytest.warns(UserWarning, match=r"^3 unreadable images of .* left out, first .*deep.png \(mode I;16 has more"):
        images = load_image_folder(folder, size=4, progress=shares.append)
    assert images.num_skipped == 3
    assert images.classes.tolist() == [0, 0, 1]
    assert len(images.pixels) == 3
    assert shares[-1] == 1.0


def test_strict_refuses_the_first_unreadable_image(folder: Path) -> None:
    (folder / "cat" / "text.jpg").write_text("no image at all")
    with pytest.raises(ArgumentError, match=r"path must hold readable images; .*text.jpg .* Remove it, or pass strict"):
        load_image_folder(folder, size=4, strict=True)


def test_a_class_without_a_readable_image_is_refused(folder: Path) -> None:
    (folder / "dog" / "b.png").write_bytes(b"")
    with pytest.raises(
        ArgumentError, match=r"every class must have a file that can be read; .*dog has none, of 1 unreadable images"
    ):
        load_image_folder(folder, size=4)


@pytest.mark.parametrize("format_name", ["png", "jpeg"])
def test_damage_anywhere_is_one_clear_line(format_name: str, tmp_path: Path) -> None:
    """Whatever bytes change, the image is read or left out: nothing else is raised."""
    rng = np.random.default_rng(0)
    draw_image(tmp_path / "a" / "whole.png", (1, 2, 3))
    file = tmp_path / "a" / f"x.{format_name}"
    turned = Image.Exif()
    turned[0x0112], turned[0x010E] = 6, "text"
    Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(file, exif=turned)
    content, num_skipped = file.read_bytes(), 0
    for _ in range(300):
        damaged = bytearray(content)
        for place in rng.integers(0, min(200, len(content)), 3):  # headers and EXIF stand in front
            damaged[place] = rng.integers(0, 256)
        file.write_bytes(damaged[: rng.integers(1, len(content)) if rng.random() < 0.3 else None])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            num_skipped += load_image_folder(tmp_path, size=4).num_skipped
    assert num_skipped


def test_folders_that_hold_no_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="path must be an existing folder; got .*nowhere"):
        load_image_folder(tmp_path / "nowhere", size=4)
    with pytest.raises(ArgumentError, match="path must hold a sub-folder for each class; .* has none"):
        load_image_folder(tmp_path, size=4)
    draw_image(tmp_path / "flat.png", (0, 0, 0))
    with pytest.raises(ArgumentError, match="path must hold a sub-folder for each class"):
        load_image_folder(tmp_path, size=4)
    with pytest.raises(ArgumentError, match="path must be an existing folder; got .*flat.png"):
        load_image_folder(tmp_path / "flat.png", size=4)
    draw_image(tmp_path / "full" / "x.png", (0, 0, 0))
    (tmp_path / "void").mkdir()
    with pytest.raises(ArgumentError, match="must hold .png or .jpg or .jpeg files; .*void holds none"):
        load_image_folder(tmp_path, size=4)


def test_sizes_must_be_positive(folder: Path) -> None:
    with pytest.raises(ArgumentError, match="size must be positive; got 0"):
        load_image_folder(folder, size=0)
