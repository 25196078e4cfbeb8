"""Rows with a border that one layer hands to the next: found again where they are the same, and nothing else is."""

from __future__ import annotations

import torch

from tunesmith.kernels.rows import Rows, hand_on, in_rows, taken_over

N, WIDTH, BORDER = 5, 8, 4


def _rows() -> Rows:
    return Rows(torch.randn(N, WIDTH + BORDER).bfloat16())


def test_what_was_handed_on_is_found_again_with_its_border_through_views() -> None:
    rows = _rows()
    handed = hand_on(rows, WIDTH)
    assert torch.equal(handed, rows.wide_NW[:, :WIDTH])
    found = taken_over(handed[None].squeeze(0), BORDER)
    assert found is not None
    assert found.wide_NW.data_ptr() == rows.wide_NW.data_ptr()
    assert torch.equal(found.wide_NW, rows.wide_NW)


def test_nothing_else_is_taken_over() -> None:
    """Else what stands behind another's rows would be written over."""
    rows, other = _rows(), _rows()
    handed = hand_on(rows, WIDTH)
    assert taken_over(other.wide_NW[:, :WIDTH], BORDER) is None, "laid out alike, but not what was handed on"
    assert taken_over(handed.clone(), BORDER) is None
    assert taken_over(handed, 2 * BORDER) is None, "another border"
    assert taken_over(rows.wide_NW[:, BORDER:], BORDER) is None, "another part of the rows"
    assert taken_over(rows.wide_NW.view(torch.float16)[:, :WIDTH], BORDER) is None, "other numbers"
    hand_on(other, WIDTH)
    assert taken_over(handed, BORDER) is None, "only what was handed on last"


def test_memory_of_what_is_gone_is_not_taken_for_it() -> None:
    for _ in range(50):
        hand_on(_rows(), WIDTH)
        assert taken_over(_rows().wide_NW[:, :WIDTH], BORDER) is None


def test_rows_are_copied_only_where_their_values_lie_apart() -> None:
    x = torch.randn(N, WIDTH)
    assert in_rows(x) is x
    one = torch.ones(()).expand(N, WIDTH)
    assert in_rows(one).stride() == (WIDTH, 1)
    assert torch.equal(in_rows(x.T), x.T)
