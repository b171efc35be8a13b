"""A weight with an adapter merged in, made in pieces of some rows: W + scale * B A in float32, rounded once.

torch computes, with one thread a piece: numpy rounds to 16 bits ten times slower.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from config.errors import JobFailed
from trainer_node.export.architectures import Arrange, unchanged
from trainer_node.export.lora import LowRank
from trainer_node.export.weights import Kind, Matrix, Tensor, row_bytes

F16_END = 65520.0  # the least number that F16 rounds to infinity
NO_NUMBER = "fetch the base again; if it is whole, the training has diverged: train again, with a lower learning rate"
PIECE_VALUES = 2**20  # of a weight at once: memory is some of these a core


@dataclass(frozen=True)
class Weight:
    """A tensor to write: the base's, what is added to it, and how the rows of each are arranged, `unit` of them together."""

    source: Tensor
    kind: Kind
    added: LowRank | None = None
    arrange: Arrange = unchanged
    arrange_added: Arrange = unchanged
    unit: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def size(self) -> int:
        return self.shape[0] * row_bytes(self.source.columns, self.kind)

    def pieces(self) -> Iterator[Callable[[], memoryview]]:
        """Calls that make its bytes, some rows each."""
        count = self.shape[0]
        step = max(PIECE_VALUES // self.source.columns // self.unit, 1) * self.unit
        a = self.added.a.rows() if self.added is not None else None
        for first in range(0, count, step):
            yield partial(self._rows, first, min(first + step, count), a)

    def _rows(self, first: int, last: int, a: Matrix | None) -> memoryview:
        import torch

        rows = torch.from_numpy(np.ascontiguousarray(self.arrange(self.source.rows(first, last))))
        if self.added is not None:
            b = np.ascontiguousarray(self.arrange_added(self.added.b.rows(first, last)))
            rows.addmm_(torch.from_numpy(b), torch.from_numpy(a), alpha=self.added.scale)
        try:
            return rounded(rows, self.kind).data
        except JobFailed as error:
            raise JobFailed(f"{self.source.path}: {error}", hint=error.hint) from error


def rounded(values: Any, kind: Kind) -> npt.NDArray[Any]:
    """The float32 tensor as F32, F16 or BF16 (its bits), each value to the nearest.

    Raises:
        JobFailed: one is no number, or too large for F16.
    """
    import torch

    least, most = torch.aminmax(values)
    if not -math.inf < least <= most < math.inf:
        raise JobFailed("a weight, or what the adapter adds to it, is no number", hint=NO_NUMBER)
    if kind is Kind.F32:
        return np.asarray(values.numpy())
    if kind is Kind.BF16:
        return np.asarray(values.bfloat16().view(torch.int16).numpy())
    if max(-least, most) >= F16_END:
        raise JobFailed("a weight is too large for F16", hint="make a folder of it, which keeps its BF16: --route hf")
    return np.asarray(values.half().numpy())


@contextmanager
def one_thread_a_piece() -> Iterator[None]:
    """torch in threads that are started inside uses no threads of its own."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
