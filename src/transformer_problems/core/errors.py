"""Every error this package raises, in one tree.

TransformerProblemsError
├── ArgumentError (ValueError)          a parameter breaks a rule
│   ├── UnknownNameError                a name nobody has; the nearest, or the few there are, are listed
│   ├── SequenceTooLongError            longer than a fixed-length method allows
│   └── CombinationError                two parts that do not fit each other
├── CatalogueError                      the catalogue, or what a package adds to it, breaks its form
├── MissingDependencyError (ImportError) an optional package is not installed
├── KernelBuildError                    a compiled kernel cannot be built or loaded on this machine
├── DivergedError                       training met a number that is not finite
├── CheckpointError (ValueError)        a checkpoint that cannot be examined: missing, damaged, unsafe, of another kind
├── DeviceError                         a device that this machine does not have
├── ContractError (AssertionError)      a module breaks the contract of its slot
├── OutputError                         a folder or file that cannot be written
└── StoreError                          a results file that cannot be used
    ├── StoreVersionError               written by another version
    └── StoreCorruptedError             truncated, damaged, or no results file at all
"""

from collections.abc import Iterable
from difflib import get_close_matches


class TransformerProblemsError(Exception):
    """Root of all errors raised on purpose by this package."""


class ArgumentError(TransformerProblemsError, ValueError):
    """A parameter breaks a rule; the message names it, the rule, the value and the remedy."""


_FEW = 8  # names that a message has room for; the catalogue, which has more, is listed by a command


class UnknownNameError(ArgumentError):
    """A name that is not among the known ones.

    Args:
        kind: What was looked up, e.g. "problem".
        name: The name received, or whatever stands in its place.
        known: Every name that would have been accepted.
    """

    def __init__(self, kind: str, name: object, known: Iterable[str]) -> None:
        self.kind, self.name = kind, name
        names, wanted = list(known), name if isinstance(name, str) else ""
        part = wanted.strip("*.")  # all of a plain name, the middle of a pattern
        holding = [other for other in names if part and part in other]
        self.nearest = get_close_matches(wanted.lower(), names, n=3, cutoff=0.4) or holding[:3]
        if self.nearest:
            hint = f"Nearest: {', '.join(self.nearest)}."
        elif len(names) > _FEW and kind in ("problem", "solution", "problem or solution"):
            hint = "See `transformer-problems list`."
        else:
            hint = f"Known: {', '.join(names[:_FEW])}{', ...' if len(names) > _FEW else '.'}"
        super().__init__(f"unknown {kind} {name!r}. {hint}")


class SequenceTooLongError(ArgumentError):
    """An input longer than a method of fixed length allows."""


class CombinationError(ArgumentError):
    """Two parts that cannot work together."""


class CatalogueError(TransformerProblemsError):
    """The catalogue, or what an installed package adds to it, breaks a rule of its form."""


class MissingDependencyError(TransformerProblemsError, ImportError):
    """An optional package is needed and not installed."""


class KernelBuildError(TransformerProblemsError):
    """A C++ kernel cannot be compiled, kept or loaded on this machine."""


class DivergedError(TransformerProblemsError):
    """Training met a loss or a gradient that is not finite; the message says at which step, and where it began."""


class CheckpointError(TransformerProblemsError, ValueError):
    """A checkpoint cannot be examined; the message says why, and what to do."""


class DeviceError(TransformerProblemsError):
    """A device was asked for that this machine does not have."""


class ContractError(TransformerProblemsError, AssertionError):
    """A module breaks the contract of the slot it was checked for."""


class OutputError(TransformerProblemsError):
    """Results or pages cannot be written where they were asked for."""


class StoreError(TransformerProblemsError):
    """A results file cannot be used."""


class StoreVersionError(StoreError):
    """A results file was written by another version of the store."""


class StoreCorruptedError(StoreError):
    """A results file is truncated, damaged, or not a results file."""
