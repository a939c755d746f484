"""How many operations a call launches, and how many bytes they read and write."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from transformer_problems.core.errors import ArgumentError

_ROWS_ALONE = {"embedding", "index_select", "gather", "index"}  # they read what they return, of a table of any size
_OVERWRITE = {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_", "exponential_"}
_ALLOCATE = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
_COMPILED_CALL = "## Call CompiledFxGraph"
_NO_KERNELS = ("aten::empty", "aten::as_strided", "aten::view", "aten::reshape", "aten::t", "aten::transpose")


@dataclass(frozen=True, slots=True)
class KernelCount:
    """Operations that touch memory, and the bytes of the tensors that they read and wrote."""

    kernels: int
    bytes_read: int
    bytes_written: int

    @property
    def bytes_moved(self) -> int:
        return self.bytes_read + self.bytes_written


def count_kernels(function: Callable[[], object]) -> KernelCount:
    """Operations in one call, forward and backward, that read or write memory, and their traffic.

    An operation of PyTorch, or of ours where it is registered as one, counts as one kernel; each tensor that it takes
    counts as read once and each that it gives as written once. Views and empty tensors cost nothing. An operation that
    works in place both reads and writes its tensor, unless it overwrites it. Of a table from which rows are looked up,
    the rows count. The figures depend on the device only as far as PyTorch takes other operators there.

    It is a model: an operation may launch several kernels inside (a sort, a product that copies its bias first) and
    read a tensor more than once, or find it in a cache. Compiled functions run uncompiled while operations are watched,
    so they are refused; `count_compiled_kernels` counts those.

    Raises:
        ArgumentError: If the function calls something compiled by torch.compile.
    """
    counter = _Counter()
    with _refusing_compiled(), counter:
        function()
    return KernelCount(counter.kernels, counter.bytes_read, counter.bytes_written)


def count_compiled_kernels(function: Callable[[], object]) -> int:
    """Kernels that the compiled graphs of a call launch, generated or from a library.

    The function is compiled anew, which takes its time, and everything else that was compiled in this process has to
    be compiled again. On CUDA the kernels that ran are counted, whatever launched them. On a CPU what runs between
    compiled graphs is not.

    Raises:
        ArgumentError: If the call runs no graph compiled by PyTorch's "inductor".
    """
    from torch._inductor import config  # takes seconds to import

    torch._dynamo.reset()
    with config.patch({"cpp.enable_kernel_profile": True}):
        function()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as profiler:
        function()
    events = list(profiler.events() or ())
    if not any(event.name.startswith(_COMPILED_CALL) for event in events):
        raise ArgumentError(
            "function must run a graph compiled by torch.compile with backend 'inductor'; it ran none. Use "
            "count_kernels."
        )
    on_cuda = sum(event.device_type == DeviceType.CUDA and not event.name.startswith("Mem") for event in events)
    return on_cuda or sum(map(_is_kernel_of_graph, events))


def _is_kernel_of_graph(event: Any) -> bool:
    parent = event.cpu_parent
    in_graph = parent is not None and parent.name.startswith(_COMPILED_CALL)
    return in_graph and not event.name.startswith(_NO_KERNELS)


@contextmanager
def _refusing_compiled() -> Iterator[None]:
    """While operations are watched, PyTorch would compile once more and then run uncompiled: that is refused here."""
    compiler_in_use = "torch._dynamo" in sys.modules  # importing it takes seconds
    stance = torch.compiler.set_stance("fail_on_recompile") if compiler_in_use else nullcontext()
    try:
        with stance:
            yield
    except RuntimeError as error:
        if "fail_on_recompile" not in str(error):
            raise
        raise ArgumentError(
            "function must not be compiled, for it would run uncompiled while it is watched. Count the model without "
            "torch.compile, or the compiled one with count_compiled_kernels."
        ) from error


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels = self.bytes_read = self.bytes_written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        with self:  # in inference mode operators come here whole that are made of others
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        output = func(*args, **kwargs)
        self._count(func, args, kwargs, output)
        return output

    def _count(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        name = func._schema.name.rpartition("::")[2]
        changed = _changed(func, args, kwargs)
        inputs, outputs = _tensors((args, kwargs)), _tensors(output)
        given = {_storage(x) for x in inputs}
        made = [y for y in outputs if _storage(y) not in given]
        if name in _ALLOCATE or torch.Tag.inplace_view in func.tags or not _bytes([*made, *changed]):
            return
        unread = changed if name in _OVERWRITE or func._overloadname.endswith("out") else []
        read = [x for x in inputs if not any(x is y for y in unread)]
        self.kernels += 1
        self.bytes_written += _bytes([*made, *changed])
        self.bytes_read += _bytes(read) if name not in _ROWS_ALONE else _bytes(made) + _bytes(read[1:])


def _changed(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operator writes to, by its schema."""
    written = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += _tensors(args[i] if i < len(args) else kwargs.get(argument.name))
    return written


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(x: Tensor) -> int:
    address: int = x.untyped_storage()._cdata
    return address


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of the elements that there are in memory: of an expanded dimension one, of a tensor met twice once."""
    found: dict[object, int] = {}
    for x in tensors:
        sizes = [1 if stride == 0 and size else size for size, stride in zip(x.shape, x.stride(), strict=True)]
        found[_storage(x), x.storage_offset(), x.shape, x.stride()] = prod(sizes) * x.element_size()
    return sum(found.values())
