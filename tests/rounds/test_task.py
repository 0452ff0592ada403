from __future__ import annotations

from histoflare.bags.targets.classes import Predictions
from histoflare.rounds.evaluation import Rows
from histoflare.rounds.task import PredictionTable, Task

from ..mem import make_mem_task
from .toy import ToyTask


def test_tasks_have_what_a_round_asks_for() -> None:
    members = [name for name in Task.__dict__ if not name.startswith("_")]
    assert {"labels", "build_model", "build_optimizer", "train_batches", "predict"} <= set(members)
    for kind in (ToyTask(), make_mem_task(["a", "b"], "encoder")):
        assert [name for name in members if not hasattr(kind, name)] == []


def test_both_prediction_tables_have_the_columns_evaluation_reads() -> None:
    columns = [name for name in PredictionTable.__dict__ if not name.startswith("_")]
    for kind in (Predictions, Rows):
        assert set(columns) <= {*kind.__dataclass_fields__, *vars(kind)}
