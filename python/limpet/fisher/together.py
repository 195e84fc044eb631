"""Columns of one parameter's gradients that take one contraction for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from limpet.fisher.contributions import Convolution, Matrix, Vector
from limpet.reference import wide


class Together:
    r"""Holds back the columns' uses as long as the root of their squares' sum stands for all of them.

    That is so where the gradients at a sample's channel are multiples of one another: with
    :math:`g_{kt} = v_k m_t`, :math:`\sum_k (\sum_t g_{kt} x_t)^2 = (\sum_t \sqrt{\sum_k g_{kt}^2} x_t)^2` for
    ``m`` of zeros and ones. Matrices and vectors without places have one place. Of convolutions it holds before a
    global average pooling: what reaches all places is the same value, or, behind a ReLU, zero where it was zero.
    """

    def __init__(self) -> None:
        self._apart = False  # whether columns were seen that are no multiples: in later batches as well, most likely
        self._use: Matrix | Vector | Convolution | None = None
        self._squares: Tensor | None = None  # [N, O, *], of all columns
        self._places: Tensor | None = None  # bool [N, O, *], where they are not zero

    def take(self, use: Any, total: Callable[[], Tensor]) -> bool:
        """Hold a column's use back, if it is one that may be."""
        if self._apart or not isinstance(use, (Matrix, Vector, Convolution)):
            return False
        d = use.output_grad
        if not isinstance(use, Convolution):
            self._apart = d.dim() > 2 or (isinstance(use, Vector) and use.input is not None)
        elif use.exchanged or not _constant(d[:1]) or not _constant(d):
            self._apart = True
        elif self._places is None:
            self._places = d != 0
        else:
            places = d != 0
            seen, now = (_any_place(of) for of in (self._places, places))
            self._apart = not bool(((places == self._places) | ~(seen & now)).all())
            self._places |= places
        if self._apart:
            self.finish(total)
            return False
        d = d.to(wide(d.dtype))
        self._use, self._squares = use, d.square() if self._squares is None else self._squares.addcmul_(d, d)
        return True

    def finish(self, total: Callable[[], Tensor]) -> None:
        """Add what is held back."""
        use, squares = self._use, self._squares
        self._use = self._squares = self._places = None
        if use is not None and squares is not None:
            x = None if use.input is None else use.input.to(squares.dtype)
            use._replace(output_grad=squares.sqrt_(), input=x).add_to(total())  # type: ignore[arg-type]


def _any_place(of: Tensor) -> Tensor:  # bool [N, O, *] -> [N, O, 1...]
    return of.flatten(2).any(dim=2).view(*of.shape[:2], *[1] * (of.dim() - 2))


def _constant(d: Tensor) -> bool:  # [N, O, *]
    """Whether the places of each channel are zero or one and the same value."""
    if d.numel() == 0:
        return False
    d = d.flatten(2)
    low, high = d.aminmax(dim=2, keepdim=True)
    return bool(((d == 0) | (d == torch.where(high > -low, high, low))).all())
