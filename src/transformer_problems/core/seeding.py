"""Independent random streams derived from one seed."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed that depends on `seed` and every name, the same on every machine."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator of its own for one purpose, e.g. `generator(seed, "batches")`."""
    return torch.Generator().manual_seed(derive_seed(seed, *names))


@contextmanager
def seeded(seed: int, *names: str | int) -> Iterator[None]:
    """Inside, PyTorch's global generators start from the given seed; afterwards they are as before."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, *names))
        yield
