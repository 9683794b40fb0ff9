"""Gather from a model, on images, what the methods with data need; a checkpoint of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from inputs.budget import format_bytes
from inputs.data import ImageSet
from inputs.randomness import generator
from merge.checkpoints import Checkpoint, CheckpointWriter, TensorInfo, scan
from merge.errors import MergeError
from merge.statistics.input_grams import InputGrams, Weights, linear_weights, parameter_names
from merge.statistics.squared_gradients import Labels, SquaredGradients

Kind = Literal["fisher", "gram"]
Record = dict[str, Any]


def gather(
    kind: Kind,
    model: nn.Module,
    checkpoint: Checkpoint,
    images: ImageSet,
    out: str | Path,
    *,
    memory_budget: int,
    labels: Labels = "sampled",
    examples: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Record:
    """Write the statistics of `checkpoint` on `images` to the safetensors file `out`; its record.

    `fisher`: for every parameter the mean over images of (∂ log p(y|x) / ∂w)² (2111.09832), each
    image by itself; y is drawn from the model's softmax (`sampled`), or the image's (`true`).
    `gram`: for every weight [out, in] of a linear layer `Σ xᵀx / rows` [in, in] over all rows
    (tokens) of its inputs (2212.09849), and for convolutions without groups over their patches.
    All are fp32 and named like the tensors of the model; the file's metadata is the record.

    `examples` images are drawn by `seed`, all without it. The model gets the checkpoint's weights,
    and is left on `device` in eval mode. `memory_budget` bounds what is held besides a batch's
    activations (`batch_size`): Gram matrices that do not fit together take several passes.
    Raises MergeError where the checkpoint is not the model's, the model gives no [rows, classes],
    or the budget is too small.
    """
    if len(images) == 0 or batch_size < 1 or (examples is not None and examples < 1):
        raise MergeError(
            f"{images.name}: has {len(images)} images, of which {examples or 'all'} are wanted in "
            f"batches of {batch_size}; wanted at least one of each"
        )
    if Path(out).is_dir() or Path(out).resolve() in {file.resolve() for file in checkpoint.files}:
        found = "a folder" if Path(out).is_dir() else "the checkpoint itself"
        raise MergeError(f"{out}: is {found}; name another file for the statistics")
    load_weights(model, checkpoint)
    model.to(device).eval()
    chosen = choose_images(images, examples, seed)
    room = memory_budget - sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    record: Record = {
        "kind": kind,
        "checkpoint": checkpoint.path,
        "sha256": scan(checkpoint).sha256,
        "images": images.name,
        "images_sha256": chosen.digest(),
        "examples": len(chosen),
        "seed": seed,
    }
    bar = partial(tqdm, unit="image", disable=not progress, leave=False)
    run = _Run(model, checkpoint, chosen, Path(out), room, batch_size, torch.device(device), bar)
    if kind == "fisher":
        return _gather_fisher(run, labels, seed, record)
    return _gather_grams(run, record)


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Give the model a checkpoint's tensors; MergeError that names every one that differs.

    Of tensors that the model ties one name is enough.
    """
    state, problems = model.state_dict(), []
    found = checkpoint.tensors
    present = {state[name].data_ptr() for name in found if name in state}
    for name, tensor in state.items():
        if name not in found and (tensor.data_ptr() not in present or not tensor.numel()):
            problems.append(f"'{name}' is missing")
        elif name in found and found[name].shape != tuple(tensor.shape):
            problems.append(
                f"'{name}' is {list(found[name].shape)}, the model has {list(tensor.shape)}"
            )
    problems += [f"'{name}' is not in the model" for name in found if name not in state]
    if problems:
        raise MergeError(
            f"{checkpoint.path}: {'; '.join(problems)}; choose the checkpoint of this model, or "
            "the model (name, kwargs, classes) of this checkpoint"
        )
    for name in found:
        state[name].copy_(checkpoint.read(name))


def read_record(statistics: Checkpoint) -> Record:
    """The record of a checkpoint that `gather` wrote; MergeError for any other."""
    problem = f"{statistics.path}: is no file of gathered statistics; gather them first"
    if len(statistics.files) != 1:
        raise MergeError(problem)
    try:
        with safetensors.safe_open(statistics.files[0], framework="pt") as file:
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise MergeError(problem) from error
    if "gathered" not in metadata:
        raise MergeError(problem)
    return json.loads(metadata["gathered"])


def check_statistics(statistics: Checkpoint, kind: Kind, *, sha256: str | None = None) -> Record:
    """The record of gathered statistics, if they are of this kind (and of this checkpoint).

    `sha256` is that of the checkpoint's scan. Raises MergeError that names what differs.
    """
    record = read_record(statistics)
    if record["kind"] != kind:
        raise MergeError(
            f"{statistics.path}: holds statistics of kind {record['kind']!r}, wanted {kind!r}; "
            f"gather those of {record['checkpoint']}"
        )
    if sha256 is not None and record["sha256"] != sha256:
        raise MergeError(
            f"{statistics.path}: was gathered from {record['checkpoint']} with other weights "
            f"(sha256 {record['sha256'][:12]}…, wanted {sha256[:12]}…); gather it again"
        )
    return record


@dataclass(frozen=True)
class _Run:
    """One model on some images: what both kinds share."""

    model: nn.Module
    checkpoint: Checkpoint
    images: ImageSet
    out: Path
    room: int
    batch_size: int
    device: torch.device
    bar: Callable[..., Any]

    def batches(self, title: str) -> Iterator[tuple[Tensor, Tensor]]:
        with self.bar(total=len(self.images), desc=title) as bar:
            for pixels, labels in self.images.batches(self.batch_size):
                yield pixels.to(self.device), labels.to(self.device)
                bar.update(len(labels))

    def check_room(self, needed: int, what: str) -> None:
        if needed > self.room:
            raise MergeError(
                f"memory_budget: {what} needs {format_bytes(needed)} besides the model, there is "
                f"room for {format_bytes(max(self.room, 0))}; raise it by at least "
                f"{format_bytes(needed - self.room)}"
            )

    def writer(self, shapes: Mapping[str, tuple[int, ...]], record: Record) -> CheckpointWriter:
        infos = [TensorInfo(name, shape, torch.float32) for name, shape in shapes.items()]
        return CheckpointWriter(self.out, infos, metadata={"gathered": json.dumps(record)})

    def write(
        self, writer: CheckpointWriter, names: Sequence[str], values: Float[Tensor, ...]
    ) -> None:
        """Write a tensor under each of its names; MergeError if it is not finite."""
        if not values.isfinite().all():
            raise MergeError(
                f"{self.checkpoint.path}: the statistics of '{names[0]}' on {self.images.name} are "
                "not finite; look for NaN in its weights, or leave it out"
            )
        for name in names:
            writer.write(name, values)


def choose_images(images: ImageSet, examples: int | None, seed: int) -> ImageSet:
    """`examples` images drawn without replacement, in the order of the set; all without it."""
    if examples is None or examples >= len(images):
        return images
    order = torch.randperm(len(images), generator=generator(seed, "statistics/examples"))
    return images.subset(order[:examples].sort().values)


def _gather_fisher(run: _Run, labels: Labels, seed: int, record: Record) -> Record:
    parameters = {n: p.detach() for n, p in run.model.named_parameters()}
    held = sum(4 * parameter.numel() for parameter in parameters.values())
    run.check_room(3 * held, "the Fisher information of one image")
    _check_classes(run, labels)
    # A gradient per image of a micro-batch, and (measured) up to twice as much on the way there.
    at_once = max((run.room - held) // max(3 * held, 1), 1)
    squares = SquaredGradients(run.model, parameters, labels, at_once)
    draws = generator(seed, "statistics/labels")
    uniform = torch.rand(len(run.images), generator=draws).to(run.device)
    seen = 0
    for pixels, true in run.batches("fisher"):
        squares.add(pixels, true if labels == "true" else uniform[seen : seen + len(true)])
        seen += len(true)
    for total in squares.totals.values():
        total.div_(seen)
    norm = math.sqrt(sum(float(t.double().square().sum()) for t in squares.totals.values()))
    record = {**record, "labels": labels, "norm": norm, "one_by_one": squares.one_by_one}
    ids = parameter_names(run.model)
    names = {name: ids[id(parameter)] for name, parameter in run.model.named_parameters()}
    shapes = {alias: tuple(squares.totals[n].shape) for n in names for alias in names[n]}
    with run.writer(shapes, record) as writer:
        for name, total in squares.totals.items():
            run.write(writer, names[name], total)
    return record


@torch.no_grad()
def _check_classes(run: _Run, labels: Labels) -> None:
    """MergeError unless the model gives logits [rows, classes] for the labels of the images."""
    pixels, _ = next(run.images.batches(1))
    logits = run.model(pixels.to(run.device))
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise MergeError(
            f"the model gives {found} for one image, wanted logits [1, classes]; Fisher "
            "information is gathered from classifiers"
        )
    lowest, highest = (int(end) for end in run.images.labels.aminmax())
    if labels == "true" and not 0 <= lowest <= highest < logits.shape[1]:
        raise MergeError(
            f"{run.images.name}: has labels from {lowest} to {highest}, the model knows "
            f"{logits.shape[1]} classes; use images of its classes, or labels: sampled"
        )


@torch.no_grad()
def _gather_grams(run: _Run, record: Record) -> Record:
    weights = linear_weights(run.model)
    group = _take(run, weights)
    grams = _pass(run, group)
    seen = {key: weight for key, weight in weights.items() if grams.rows[key]}
    if not seen:
        raise MergeError(
            "the model has no linear layer or convolution that sees the images; merge it by "
            "another method"
        )
    shapes = {name: (w.inputs, w.inputs) for w in seen.values() for name in w.names}
    unseen = [name for key, w in weights.items() if key not in seen for name in w.names]
    rows = {name: grams.rows[key] for key, w in seen.items() for name in w.names}
    record = {**record, "rows": rows, "unseen": sorted(unseen)}
    with run.writer(shapes, record) as writer:
        while True:
            for key in group:
                total = grams.sums.pop(key)
                if key in seen:
                    mean = total.div_(grams.rows[key]).float()
                    run.write(writer, seen.pop(key).names, mean)
            if not seen:
                return record
            group = _take(run, seen)
            grams = _pass(run, group)


def _take(run: _Run, weights: Weights) -> Weights:
    """The first of the weights whose sums fit together."""
    group: Weights = {}
    held, product = 0, 0
    for key, weight in weights.items():
        held, product = held + weight.nbytes, max(product, weight.nbytes // 2)
        if group and held + product > run.room:
            break
        run.check_room(held + product, f"the Gram matrix of '{weight.names[0]}'")
        group[key] = weight
    return group


def _pass(run: _Run, group: Weights) -> InputGrams:
    """Show the model all images, adding up the Gram matrices of a group of weights."""
    grams = InputGrams(group, run.device)
    with grams.watching(run.model):
        for pixels, _ in run.batches("gram"):
            run.model(pixels)
    return grams
