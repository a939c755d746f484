"""Which package of the standard library does a short excerpt come from: labelled real text on every machine."""

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from transformer_problems.core.arguments import require_multiple_of
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.seeding import generator
from transformer_problems.lab.data.text import sample_windows

SOURCE_PACKAGES = ("http", "importlib", "json", "urllib", "wsgiref")
PACKAGES = ("asyncio", "email", "multiprocessing", "unittest", "xml")
_HELD_OUT = 0.2  # of each package's bytes, for test


@dataclass(frozen=True, slots=True, eq=False)
class Excerpts:
    """Excerpts [B, N] int64, bytes, and the index of the package that each comes from, [B]."""

    tokens: Tensor
    classes: Tensor


def load_excerpts(packages: Sequence[str], *, length: int, num: int, is_test: bool) -> Excerpts:
    """Excerpts at random places, as many from each package; every call with the same arguments gives the same.

    No file is in training and test both: the largest file of a package trains, the others, ordered by a hash of their
    names, go to test until it holds 20% of the package.

    Args:
        packages: Names of packages of the standard library, the classes in that order.
        length: Of each excerpt, in bytes.
        num: Excerpts in all, a multiple of the number of packages.
        is_test: Whether they come from the files held out.

    Raises:
        ArgumentError: If there is no such package, `num` is no such multiple, or a package's text is too short.
    """
    require_multiple_of("num", num, len(packages), "as many from each package")
    draws = generator(0, "excerpts", *packages, str(is_test))
    num_each = num // len(packages)
    texts = [_text_of(package, is_test) for package in packages]
    tokens = torch.cat([sample_windows(text, num=num_each, length=length, generator=draws) for text in texts])
    classes = torch.arange(len(packages)).repeat_interleave(num_each)
    order = torch.randperm(num, generator=draws)
    return Excerpts(tokens[order], classes[order])


def load_unlabelled(packages: Sequence[str]) -> Tensor:
    """All text of these packages but the files that test excerpts come from, [bytes] uint8.

    Raises:
        ArgumentError: If there is no such package.
    """
    return torch.cat([_text_of(package, is_test=False) for package in packages])


def _text_of(package: str, is_test: bool) -> Tensor:
    root = Path(sysconfig.get_paths()["stdlib"]) / package
    files = [file for file in sorted(root.rglob("*.py")) if not {"test", "tests"} & set(file.relative_to(root).parts)]
    if not files:
        raise ArgumentError(
            f"packages must be of the standard library; {package!r} has no modules in {root.parent}. "
            f"Choose from {', '.join((*PACKAGES, *SOURCE_PACKAGES))} and their like."
        )
    contents = {file.relative_to(root).as_posix(): file.read_bytes() for file in files}
    largest = max(contents, key=lambda name: len(contents[name]))
    wanted, held_out = _HELD_OUT * sum(map(len, contents.values())), 0
    chosen = [] if is_test else [contents[largest]]
    for name in sorted(contents.keys() - {largest}, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if (held_out < wanted) == is_test:
            chosen.append(contents[name])
        held_out += len(contents[name])
    return torch.frombuffer(bytearray(b"\n".join(chosen)), dtype=torch.uint8)
