"""Where a model keeps its layers, and what goes from one to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def layers_of(layers: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    """The layers of a sequence, of a ModuleList, or of the only outermost ModuleList of a model.

    Raises:
        ValueError: a model that has no such list or several, naming those it has.
    """
    if not isinstance(layers, nn.Module) or isinstance(layers, nn.ModuleList | nn.Sequential):
        return list(layers)
    found: dict[str, nn.ModuleList] = {}
    for name, module in layers.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            found[name] = module
    if len(found) != 1:
        raise ValueError(
            f"checkpoint_segments: expected one stack of layers in {type(layers).__name__}, found {sorted(found)}; "
            "pass the layers themselves"
        )
    return list(next(iter(found.values())))


def has_segments(layer: nn.Module) -> bool:
    """Whether checkpoint_segments has taken the place of the layer's forward."""
    return hasattr(vars(layer).get("forward"), "segment")


def hidden_of(output: Any) -> Any:
    """A layer's hidden states: its output, or the first entry of a tuple."""
    return output[0] if isinstance(output, tuple) and output else output


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden states among a layer's arguments: the first if it is a tensor, else the one of that name."""
    first = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
    return first if isinstance(first, Tensor) else None
