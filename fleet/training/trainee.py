"""One model in training: where it is in its recipe, and all that only it has."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from fleet.training.averages import Average
from fleet.training.feed import Feed
from fleet.training.halving import Patience
from fleet.training.optimizers import ModelOptimizer, restore
from fleet.training.schedules import lr_factor

if TYPE_CHECKING:
    from fleet.recipes import Recipe
    from inputs.data import ImageSet

POINTS_PER_EPOCH = 10

Phase = Literal["head", "fit"]
State = Literal["training", "done", "failed", "stopped"]


@runtime_checkable
class TrainingData(Protocol):
    """What a model is trained on, and what its own stopping may look at."""

    @property
    def fit(self) -> ImageSet: ...

    @property
    def tune(self) -> ImageSet: ...


@dataclass(frozen=True)
class TrainResult:
    """One model's weights: how long they were trained, and how they do on *tune*.

    `epochs` is the epoch that the weights are from (`keep: best` may go back to an earlier one),
    without head epochs; `seconds` is the time since its training began, `index` its place in
    `models`. A model that "failed" or was "stopped" has no weights, and a `reason`.
    """

    index: int
    epochs: int
    tune_accuracy: float
    tune_loss: float
    seconds: float
    state: State = "done"
    reason: str = ""


@dataclass(frozen=True)
class Point:
    """One point of a model's curve: some ten in each epoch, the last at its end.

    `epoch` counts from 1 and `step` from the beginning of the phase; `loss` is the mean since the
    point before, `grad_norm` that of the step before clipping, `seconds` the time since the
    model's training began. Scores on *tune* are there where the recipe looks at them.
    """

    name: str
    phase: Phase
    epoch: int
    step: int
    loss: float
    lr: float
    grad_norm: float
    tune_accuracy: float | None
    tune_loss: float | None
    seconds: float
    state: State


class Trainee:
    """A model in training: `state` holds its tensors, views into those of its bucket."""

    def __init__(
        self,
        index: int,
        name: str,
        recipe: Recipe,
        data: TrainingData,
        *,
        classes: int,
        dtype: torch.dtype,
    ) -> None:
        self.index, self.name, self.recipe, self.data = index, name, recipe, data
        self.classes, self.dtype = classes, dtype
        self.state: dict[str, Tensor] = {}
        self.phase: Phase = "head" if recipe.head_epochs else "fit"
        self.step = 0
        self.losses: list[Tensor | float] = []
        self.grad_norm: Tensor | float = 0.0
        self.average: Average | None = None
        self.best: tuple[TrainResult, dict[str, Tensor]] | None = None
        self.patience = Patience(recipe.patience)
        self.rank = (recipe.batch_size, index)
        self._before = 0.0
        self._began = time.perf_counter()
        self._optimizer: ModelOptimizer | None = None
        self._trained: tuple[str, ...] = ()
        self._enter_phase()

    def _enter_phase(self) -> None:
        epochs = self.recipe.head_epochs if self.phase == "head" else self.recipe.epochs
        self.feed = Feed(self.data.fit, self.recipe, self.classes, self.phase, epochs)
        self._optimizer = None

    @property
    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._began

    @property
    def rows(self) -> int:
        """How many images the next batch has."""
        return self.feed.rows(self.step)

    @property
    def epoch(self) -> int:
        """The epoch that the last step was in, from 1."""
        return -(-self.step // self.feed.steps_per_epoch)

    @property
    def ends_epoch(self) -> bool:
        return self.step % self.feed.steps_per_epoch == 0

    @property
    def at_point(self) -> bool:
        """Whether a point of the curve follows the last step."""
        return self.ends_epoch or self._is_point(self.step)

    def reaches_point(self) -> bool:
        """Whether a point of the curve follows the next step."""
        return (self.step + 1) % self.feed.steps_per_epoch == 0 or self._is_point(self.step + 1)

    def _is_point(self, step: int) -> bool:
        every = max(1, self.feed.steps_per_epoch // POINTS_PER_EPOCH)
        return step % self.feed.steps_per_epoch % every == 0

    @property
    def lr(self) -> float:
        """That of the next step; of the last one after it was made, see `last_lr`."""
        return self.recipe.lr * lr_factor(self.step, self.feed.steps, self.recipe)

    @property
    def last_lr(self) -> float:
        return self.recipe.lr * lr_factor(self.step - 1, self.feed.steps, self.recipe)

    def begin(self, names: Sequence[str]) -> None:
        """Train these tensors of `state` in this phase, unless that is going on already."""
        if self._optimizer is not None:
            return
        self._trained = tuple(names)
        self._optimizer = ModelOptimizer(self.recipe, self.parameters)
        if self.phase == "fit":
            self.average = Average.of(self.recipe, self.state)

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {name: self.state[name] for name in self._trained}

    def bind(self, state: dict[str, Tensor]) -> None:
        """The same tensors, in other places."""
        self.state = state
        if self._optimizer is not None:
            self._optimizer.bind(self.parameters)

    def release(self) -> dict[str, Tensor]:
        """Let go of the tensors of `state`, which are returned, until they are bound again."""
        state, self.state = self.state, {}
        if self._optimizer is not None:
            self._optimizer.release()
        return state

    def update(self, gradients: dict[str, Tensor]) -> None:
        """One step of its optimizer, which may write into the gradients."""
        assert self._optimizer is not None
        self._optimizer.step(gradients, self.lr)
        if self.average is not None:
            self.average.update(self.state, self.step, self.feed.steps, self.feed.steps_per_epoch)
        self.step += 1

    def next_phase(self) -> None:
        """From the head alone to what the recipe trains."""
        self.phase, self.step = "fit", 0
        self._enter_phase()

    def judged(self) -> dict[str, Tensor]:
        """The weights that are scored and kept: averages where the recipe asks for them."""
        return self.state if self.average is None else {**self.state, **self.average.value()}

    def first_bad_step(self) -> int | None:
        """The step with the first loss that is not finite since the last look; None without one."""
        tensors = [torch.as_tensor(loss, dtype=torch.float64) for loss in self.losses]
        self.losses = torch.stack(tensors).tolist() if tensors else []
        for place, loss in enumerate(self.losses):
            if loss - loss != 0:
                return self.step - len(self.losses) + place + 1
        return None

    def point(self, score: tuple[float, float] | None, state: State) -> Point:
        """The curve's next point; losses are counted anew after it."""
        mean = sum(map(float, self.losses)) / len(self.losses) if self.losses else float("nan")
        self.losses = []
        accuracy, loss = (None, None) if score is None else score
        return Point(
            self.name,
            self.phase,
            self.epoch,
            self.step,
            mean,
            self.last_lr,
            float(self.grad_norm),
            accuracy,
            loss,
            self.seconds,
            state,
        )

    def record(self) -> dict[str, Any]:
        """All of it but its tensors, as JSON."""
        return {
            "phase": self.phase,
            "step": self.step,
            "losses": [float(loss) for loss in self.losses],
            "grad_norm": float(self.grad_norm),
            "seconds": self.seconds,
            "patience": self.patience.state(),
            "best": None if self.best is None else asdict(self.best[0]),
            "trained": list(self._trained),
        }

    def tensors(self) -> dict[str, Tensor]:
        """All its tensors: weights, the optimizer's, averages, and the best weights so far."""
        own = {} if self._optimizer is None else self._optimizer.tensors()
        found = {f"state/{name}": tensor for name, tensor in self.state.items()}
        found |= {f"optimizer/{name}": tensor for name, tensor in own.items()}
        average = {} if self.average is None else self.average.tensors()
        found |= {f"average/{name}": tensor for name, tensor in average.items()}
        best = {} if self.best is None else self.best[1]
        return found | {f"best/{name}": tensor for name, tensor in best.items()}

    def restore(self, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """As it was when `record` and `tensors` were taken; what `state` holds is overwritten."""
        saved = _under("state/", tensors)
        restore(self.state, saved, f"the snapshot of {self.name}")
        self.phase, self.step = record["phase"], record["step"]
        self._enter_phase()
        self.losses, self.grad_norm = list(record["losses"]), record["grad_norm"]
        self._before = record["seconds"]
        self.patience.load(record["patience"])
        self.begin(record["trained"])
        assert self._optimizer is not None
        self._optimizer.load(_under("optimizer/", tensors))
        if self.average is not None:
            self.average.load(_under("average/", tensors))
        if record["best"] is not None:
            best = {name: t.clone() for name, t in _under("best/", tensors).items()}
            self.best = TrainResult(**record["best"]), best


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
