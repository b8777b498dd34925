"""What the settings of stages that read a cells table have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lemon.runtime.config import AnyPath, Frozen


class CellsConfig(Frozen):
    """Settings with a field ``cells``, which is checked before the libraries that work on them are imported."""

    if TYPE_CHECKING:  # each stage describes its own, at its own place
        cells: AnyPath | None

    def check_inputs(self) -> None:
        """Raises ConfigError where ``cells`` is no cells table."""
        from lemon.cells.ledger import require_cells

        if self.cells is not None:
            require_cells(self.cells)
