"""A hook that does not travel with copies of its module."""

from collections.abc import Callable
from typing import Any


class LocalHook:
    """Calls a function as a hook of modules; what copy or pickle makes of it does nothing.

    A copied or saved module carries its hooks along, to where nobody can remove them. What lends hooks to a model for a
    time wraps them in this, so that copies are free of them and the model can be saved meanwhile.

    Args:
        call: What the hook does. Default nothing.
    """

    def __init__(self, call: Callable[..., None] | None = None) -> None:
        self.call = call

    def __call__(self, *arguments: Any, **keywords: Any) -> None:
        if self.call is not None:
            self.call(*arguments, **keywords)

    def __reduce__(self) -> tuple[type["LocalHook"], tuple[()]]:
        return type(self), ()
