"""Cook a learner's coefficients into a checkpoint, by the run's rule for norm buffers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from merge.coefficients import Coefficients
from merge.cooking import cook
from soups.session import Session
from soups.zoo import load_weights, save_weights


def cook_soup(
    session: Session, coefficients: Coefficients, path: Path, *, memory_budget: int
) -> dict[str, Any]:
    """Write the soup to `path` and give the model its weights; the merge engine's record.

    With `norm_buffers: recalibrate` the running statistics, which are no mix of the ingredients',
    are then estimated again on *fit*, and the file is replaced by one that has them.
    """
    preflight = session.zoo.preflight
    path.parent.mkdir(parents=True, exist_ok=True)
    record = cook(
        coefficients,
        session.zoo.checkpoints,
        path,
        base=session.zoo.base,
        memory_budget=memory_budget,
        scans=[s for s in (*preflight.scans, preflight.base_scan) if s is not None],
        progress=session.progress,
    )
    load_weights(session.model, str(path))
    if session.norms.rule == "recalibrate" and session.norms.names:
        session.norms.recalibrate()
        save_weights(session.model, path)
        record["recalibrated"] = list(session.norms.names)
    return record
