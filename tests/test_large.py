# Tensors of more than 2^31 elements: one group, many rows, channels-last; forward and backward. Needs 16 GiB and some
# minutes, so only with --large.
from __future__ import annotations

import pytest
import torch
from torch import Tensor

import normkern

PERIOD = 1 << 16  # x repeats, so that the moments and gradients of one period are those of all
REPEATS = (1 << 15) + 3
pytestmark = pytest.mark.large


def repeated(period: Tensor) -> Tensor:
    return period.repeat(REPEATS, *[1] * (period.dim() - 1))


def periods(*shape: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple((torch.randn(shape, generator=g) + 3).bfloat16() for _ in range(2))  # type: ignore[return-value]


def check(got: Tensor, want: Tensor, rows: int) -> None:
    """The first, the last and a middle period, and the ones around element 2^31, equal what one period gives."""
    turn = (1 << 31) // (got.numel() // got.shape[0]) // rows
    for at in (0, turn - 1, turn, REPEATS // 2, REPEATS - 1):
        piece = got[at * rows : (at + 1) * rows].double()
        assert (piece - want).abs().max() <= 2**-7 * want.abs().max()


@pytest.mark.parametrize("layout", ["one group", "rows", "channels_last"])
def test_more_than_2_31_elements(layout: str) -> None:
    if layout == "rows":
        x, dy = periods(16, PERIOD // 16)
        norm = lambda t, weight: normkern.layer_norm(t, (PERIOD // 16,), weight)  # noqa: E731
        weight = torch.randn(PERIOD // 16, generator=torch.Generator().manual_seed(1))
    elif layout == "one group":
        x, dy = periods(PERIOD)
        # Instance norm of one channel of one sample.
        norm = lambda t, weight: normkern.instance_norm(t.view(1, 1, -1), weight=weight).view(-1)  # noqa: E731
        weight = torch.tensor([1.5])
    else:
        x, dy = periods(PERIOD // 64, 64)
        # Batch norm of (positions, channels): channels are innermost, as in channels_last.
        norm = lambda t, weight: normkern.batch_norm(t, None, None, weight, training=True)  # noqa: E731
        weight = torch.randn(64, generator=torch.Generator().manual_seed(1))

    exact_x, exact_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    exact = norm(exact_x, exact_weight)
    exact_dx, exact_dweight = torch.autograd.grad(exact, (exact_x, exact_weight), dy.double())

    big = repeated(x).requires_grad_()
    weight.requires_grad_()
    assert big.numel() > 1 << 31
    y = norm(big, weight)
    check(y.detach(), exact.detach(), x.shape[0])
    y.untyped_storage().resize_(0)  # backward does not need it
    big_dy = repeated(dy)
    dx, dweight = torch.autograd.grad(y, (big, weight), big_dy)
    check(dx, exact_dx, x.shape[0])
    torch.testing.assert_close(dweight.double() / REPEATS, exact_dweight, rtol=1e-5, atol=1e-3)
