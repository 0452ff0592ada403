"""TensorBoard at the server: who took part, and the metrics that policies let out. Nothing else."""

from __future__ import annotations

from typing import Any

from nvflare.apis.fl_context import FLContext

from histoflare.flare.record import RoundRecord, run_folder

BOARD_FOLDER = "tensorboard"


class TensorBoardLog:
    """Writes one point per round into the run folder."""

    def __init__(self) -> None:
        self._writer: Any = None

    def write(self, record: RoundRecord, fl_ctx: FLContext) -> None:
        """Add a round."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run_folder(fl_ctx) / BOARD_FOLDER))
        step = record.round_index
        self._writer.add_scalar("sites/taking_part", len(record.taking_part), step)
        self._writer.add_scalar("sites/refused", len(record.refused), step)
        for site, metrics in record.metrics.items():
            for name, value in metrics.items():
                if value is not None:
                    self._writer.add_scalar(f"{name}/{site}", value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the files."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
