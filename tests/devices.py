"""Several devices, simulated on one CPU: what mixes them fails as it does on GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

HOST = torch.device("cpu")
aten = torch.ops.aten
# These take tensors of several devices, and so do these on GPUs.
_COPIES = {aten.copy_.default, aten._to_copy.default}
# Index tensors may be on the host.
_INDEXES = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}


class Placed(Tensor):
    """A tensor that says it is on ``cpu:1``, ``cpu:2``, ...; its numbers are here."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor, place: torch.device) -> Placed:
        """A tensor with the same shape, elsewhere."""
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=place,
        )
        made.numbers = numbers
        return made  # type: ignore[no-any-return]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """With its place."""
        return f"Placed({self.numbers}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """One operation, on one device."""
        return _computed(func, args, kwargs or {})


@contextmanager
def several_devices() -> Iterator[None]:
    """While it lasts, ``cpu:1``, ``cpu:2``, ... are devices of their own."""
    with _Operations(), _Factories():
        yield


class _Factories(TorchFunctionMode):
    """Tensors are made of numbers on the host, and then moved."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """One function of Torch."""
        kwargs = dict(kwargs or {})
        if func is Tensor.tolist and isinstance(args[0], Placed):
            return args[0].numbers.tolist()
        if func not in (torch.tensor, torch.as_tensor) or "device" not in kwargs:
            return func(*args, **kwargs)
        place = kwargs.pop("device")
        found = func(*args, **kwargs)
        return found if place is None else found.to(place)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """One operation, on one device."""
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat, form = tree_flatten((args, kwargs))
    tensors = [one for one in flat if isinstance(one, Tensor)]
    places = {one.device for one in tensors if one.dim() or one.device != HOST}
    if func in _INDEXES:
        places = {args[0].device, *(places - {HOST})}
    if func not in _COPIES and len(places) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two "
            f"devices, {', '.join(sorted(map(str, places)))}! ({func})"
        )
    place = next(iter(places), HOST) if func not in _COPIES else args[0].device
    if kwargs.get("device") is not None:
        place = torch.device(kwargs["device"])
    plain = [
        one.numbers
        if isinstance(one, Placed)
        else HOST
        if isinstance(one, torch.device)
        else one
        for one in flat
    ]
    plain_args, plain_kwargs = tree_unflatten(plain, form)
    found = func(*plain_args, **plain_kwargs)
    returns = func._schema.returns
    if returns and all(one.alias_info and one.alias_info.is_write for one in returns):
        return args[0]  # written in place
    if place == HOST:
        return found
    return tree_map(
        lambda one: Placed(one, place) if isinstance(one, Tensor) else one, found
    )
