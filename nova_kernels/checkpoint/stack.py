"""Where a model keeps its layers, and what goes from one to the next."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

PLACES = ("forward", "_compiled_call_impl")  # what a module's call runs: the second, if there is one


def layers_of(layers: nn.Module | Sequence[nn.Module], caller: str) -> list[nn.Module]:
    """The layers of a sequence, of a ModuleList, or of the only outermost ModuleList of a model.

    Raises:
        TypeError: a sequence of something else.
        ValueError: a model that has no such list or several, naming those it has; no layers at all.
    """
    if not isinstance(layers, nn.Module) or isinstance(layers, nn.ModuleList | nn.Sequential):
        stack = list(layers)
        if not stack:
            raise ValueError(f"{caller}: expected at least one layer, got none")
        if other := [layer for layer in stack if not isinstance(layer, nn.Module)]:
            raise TypeError(f"{caller}: expected layers (nn.Module), got {type(other[0]).__name__}")
        return stack
    found: dict[str, nn.ModuleList] = {}
    for name, module in layers.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            found[name] = module
    if len(found) != 1:
        raise ValueError(
            f"{caller}: expected one stack of layers in {type(layers).__name__}, found {sorted(found)}; "
            "pass the layers themselves"
        )
    return list(next(iter(found.values())))


def has_segments(layer: nn.Module) -> bool:
    """Whether checkpoint_segments has taken the place of the layer's forward, or of its compiled call."""
    return any(hasattr(vars(layer).get(place), "segment") for place in PLACES)


def hidden_of(output: Any) -> Any:
    """A layer's hidden states: its output, or the first entry of a tuple."""
    return output[0] if isinstance(output, tuple) and output else output


class Output:
    """The hidden states that a call returned, to be recognised when the next call takes them."""

    def __init__(self, hidden: Any) -> None:
        self._hidden = hidden
        self._version = hidden._version if isinstance(hidden, Tensor) else 0

    def among(self, values: Iterable[Any]) -> Any:
        """The value that is this output, or a view of all of it as the hooks of fully_shard make one; else None.

        None, too, if it was changed in place since, or detached.
        """
        return next((value for value in values if value is not None and self._is(value)), None)

    def _is(self, value: Any) -> bool:
        hidden = self._hidden
        if not (isinstance(value, Tensor) and isinstance(hidden, Tensor)):
            return value is hidden
        return value._version == self._version and (value is hidden or _layout(value) == _layout(hidden))


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    place = tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()
    return *place, tensor.dtype, tensor.requires_grad


def without_graph(tensor: Tensor) -> Tensor:
    """The same memory as a leaf, so that it holds nothing of how it was computed."""
    return tensor if tensor.grad_fn is None else tensor.detach().requires_grad_()


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden states among a layer's arguments: the first if it is a tensor, else the one of that name."""
    first = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
    return first if isinstance(first, Tensor) else None
