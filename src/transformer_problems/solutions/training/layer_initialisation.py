"""A shallow student that starts as its teacher with layers left out."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError


def initialise_from_layers(
    student: nn.Module, teacher: nn.Module, *, layers: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Copies a teacher's embeddings, norms and head into a student of fewer layers, and some of its layers.

    The student is the teacher's architecture with a shorter stack (the first nn.ModuleList whose length differs). It
    starts from features that already work together, where a random start would spend the training on finding them.

    Args:
        student: Changed in place.
        teacher: Left as it is.
        layers: For each of the student's layers the number of the teacher's that it takes. Default evenly spread, one
            of two for half the depth.

    Returns:
        The numbers of the teacher's layers that were taken.

    Raises:
        ArgumentError: If the two do not differ in the length of a stack alone, or `layers` does not fit them.

    Source:
        Sanh et al. 2019, arXiv:1910.01108, section 3. Differs from the paper: any ratio of depths, and the layers may
        be chosen.
    """
    given, taken = teacher.state_dict(), student.state_dict()
    stack, few, many = _stacks(student, teacher)
    chosen = tuple(i * many // few for i in range(few)) if layers is None else tuple(layers)
    if len(chosen) != few or not all(isinstance(i, int) and 0 <= i < many for i in chosen):
        raise ArgumentError(
            f"layers must name one of the teacher's {many} layers, from 0, for each of the student's {few}; got "
            f"{chosen}."
        )
    sources = {name: _source(name, stack, chosen) for name in taken}
    for name, source in sources.items():
        if source not in given or given[source].shape != taken[name].shape:
            raise ArgumentError(
                f"student and teacher must differ in the length of {stack} alone; {name} is of shape "
                f"{tuple(taken[name].shape)}, the teacher's {source} {_shape(given, source)}. Build both alike."
            )
    for name, source in sources.items():
        taken[name].copy_(given[source])
    return chosen


def _stacks(student: nn.Module, teacher: nn.Module) -> tuple[str, int, int]:
    """The name of the stack that is shorter in the student, and its length in both."""
    theirs = {path: len(part) for path, part in teacher.named_modules() if isinstance(part, nn.ModuleList)}
    for path, part in student.named_modules():
        if isinstance(part, nn.ModuleList) and 0 < len(part) < theirs.get(path, 0):
            return path, len(part), theirs[path]
    raise ArgumentError(
        f"student must have a stack of layers that is shorter than the teacher's of the same name; "
        f"{type(student).__name__} has none. Build it as the teacher with fewer layers."
    )


def _source(name: str, stack: str, chosen: Sequence[int]) -> str:
    """The teacher's name for a parameter of the student."""
    prefix = f"{stack}."
    if not name.startswith(prefix):
        return name
    place, _, rest = name.removeprefix(prefix).partition(".")
    return f"{prefix}{chosen[int(place)]}.{rest}"


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    return f"of {tuple(tensors[name].shape)}" if name in tensors else "is missing"
