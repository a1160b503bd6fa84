"""Triton's interpreter, which stands in for a GPU."""

from __future__ import annotations

import pytest


def let_scalars_bound_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter makes arrays of scalars, which NumPy from 2.4 on does not take for loop bounds."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_and_index)
