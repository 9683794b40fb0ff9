"""An inspection in tables: pandas frames, and Markdown for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from tabulate import tabulate

from merge.inspection.inspection import Inspection, ModelFacts, mean_of_pairs

if TYPE_CHECKING:
    from pandas import DataFrame

NAMES_SHOWN = 6


def frames(inspection: Inspection) -> dict[str, DataFrame]:
    """The tables by name, numbers as they are."""
    from pandas import DataFrame

    cosine = DataFrame(inspection.cosines(), columns=inspection.names)
    cosine.insert(0, "model", inspection.names)
    return {
        "models": DataFrame(_model_rows(inspection)),
        "layers": DataFrame(_layer_rows(inspection)),
        "cosine": cosine,
        "pairs": DataFrame(
            _pair_rows(inspection), columns=["layer", "a", "b", "cosine", "opposed"]
        ),
        "tensors": DataFrame(_tensor_rows(inspection), columns=["tensor", "what"]),
    }


def markdown(inspection: Inspection) -> str:
    """Tables of models, cosines and layers, and what else there is to know, in words."""
    parts = ["## Models", _pipe([_shown(row) for row in _model_rows(inspection)])]
    if len(inspection.models) > 1:
        anchor = "the base" if inspection.anchor == "base" else "the mean of the models"
        parts += [f"## Cosine similarity of the deltas to {anchor}", _cosine_table(inspection)]
    if len(inspection.models) > 1 or inspection.base is not None:
        parts += ["## Layers", _pipe([_shown(row) for row in _layer_rows(inspection)])]
    return "\n\n".join([*parts, *_remarks(inspection)])


def _model_rows(inspection: Inspection) -> list[dict[str, object]]:
    models: list[tuple[str, ModelFacts]] = [(m.name, m) for m in inspection.models]
    if inspection.base is not None:
        models.append(("base", inspection.base))
    return [
        {
            "model": name,
            "tensors": facts.tensors,
            "parameters": facts.parameters,
            "norm": facts.norm,
            "delta norm": facts.delta_norm,
            "non-finite": facts.nonfinite,
            "dtypes": ", ".join(f"{dtype} {count}" for dtype, count in facts.dtypes.items()),
        }
        for name, facts in models
    ]


def _layer_rows(inspection: Inspection) -> list[dict[str, object]]:
    conflict, distances = inspection.conflict(), inspection.distances()
    rows = []
    for k, layer in enumerate(inspection.layers):
        row: dict[str, object] = {
            "layer": layer,
            "elements": int(inspection.elements[k]),
            "delta rms": float(distances[k]),
        }
        opposition = inspection.opposition(k)
        if conflict is not None and opposition is not None:
            row |= {
                "mean cosine": mean_of_pairs(inspection.cosines(k)),
                "sign conflict": float(conflict[k]),
                "of two models": mean_of_pairs(opposition),
            }
        rows.append(row)
    return rows


def _pair_rows(inspection: Inspection) -> list[tuple[object, ...]]:
    """Every pair of models, over the whole model (`all`) and in each layer."""
    rows = []
    names = inspection.names
    pairs = list(zip(*np.triu_indices(len(names), 1), strict=True))
    for layer in (None, *range(len(inspection.layers))):
        cosines, opposition = inspection.cosines(layer), inspection.opposition(layer)
        label = "all" if layer is None else inspection.layers[layer]
        rows += [
            (
                label,
                names[a],
                names[b],
                float(cosines[a, b]),
                None if opposition is None else float(opposition[a, b]),
            )
            for a, b in pairs
        ]
    return rows


def _tensor_rows(inspection: Inspection) -> list[tuple[str, str]]:
    return [
        *((name, "frozen") for name in inspection.frozen),
        *((group[0], f"tied with {', '.join(group[1:])}") for group in inspection.tied),
        *((name, f"left out: {reason}") for name, reason in inspection.left_out.items()),
    ]


def _cosine_table(inspection: Inspection) -> str:
    """Models are numbered in the head, so that it stays narrow with many of them."""
    names, cosines = inspection.names, inspection.cosines()
    rows = [
        {"": f"{k} {name}"} | {str(j + 1): _digits(cosines[k - 1, j]) for j in range(len(names))}
        for k, name in enumerate(names, 1)
    ]
    return _pipe(rows)


def _remarks(inspection: Inspection) -> list[str]:
    remarks = []
    where = "all models and the base" if inspection.base is not None else "all models"
    if inspection.frozen:
        remarks.append(f"Equal in {where}: {_listed(inspection.frozen)}.")
    remarks += [f"Tied (one tensor): {', '.join(group)}." for group in inspection.tied]
    reasons: dict[str, list[str]] = {}
    for name, reason in inspection.left_out.items():
        reasons.setdefault(reason, []).append(name)
    remarks += [f"Not compared, {reason}: {_listed(names)}." for reason, names in reasons.items()]
    if inspection.base is None and len(inspection.models) > 1:
        remarks.append(
            "Without a base the deltas are to the mean and sum to zero: two models are opposite "
            "(-1), K unrelated ones have cosines of -1/(K-1), and signs are not compared."
        )
    return remarks


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    noun = "tensor" if len(names) == 1 else "tensors"
    return f"{len(names)} {noun} ({', '.join(names[:NAMES_SHOWN])}{more})"


def _shown(row: dict[str, object]) -> dict[str, str]:
    """A row as people read it: shares in percent, big numbers with thin groups."""
    return {key: _cell(key, value) for key, value in row.items()}


def _cell(key: str, value: object) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "-"
    if key in {"sign conflict", "of two models"}:
        return f"{value:.1%}"
    if key == "mean cosine":
        return _digits(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _digits(value: object) -> str:
    if not isinstance(value, float) or np.isnan(value):
        return "-"
    return f"{round(value, 2) + 0:.2f}"  # + 0: no -0.00


def _pipe(rows: Sequence[dict[str, str]]) -> str:
    if not rows:
        return "nothing"
    align = ["left" if key in {"", "model", "layer", "dtypes"} else "right" for key in rows[0]]
    cells = [[cell.replace("|", "\\|") for cell in row.values()] for row in rows]
    return tabulate(cells, list(rows[0]), tablefmt="pipe", colalign=align, disable_numparse=True)
