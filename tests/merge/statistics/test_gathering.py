"""Gathered statistics against explicit float64 loops; the file that holds them."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inputs.data import ImageSet
from merge.checkpoints import CheckpointWriter, TensorInfo, open_checkpoint, scan
from merge.errors import MergeError
from merge.registry import METHODS
from merge.statistics.gathering import check_statistics, gather, load_weights, read_record

BUDGET = 1 << 28


class Branched(nn.Module):
    """Takes another path for bright images, as no batch of gradients can."""

    def __init__(self) -> None:
        super().__init__()
        self.bright, self.dark = nn.Linear(72, 4), nn.Linear(72, 4)

    def forward(self, images: Tensor) -> Tensor:
        chosen = [self.bright if image.mean().item() > 0 else self.dark for image in images]
        return torch.stack([f(i.flatten()) for f, i in zip(chosen, images, strict=True)])


class Attending(nn.Module):
    """torch's own attention over pixels, and an embedding that shares the head's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4, bias=False)
        self.classes = nn.Embedding(4, 8)
        self.classes.weight = self.head.weight

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images.flatten(2).mT)
        attended = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head((tokens + attended).mean(1))


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.Dropout(0.5),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, groups=2, dilation=1),
        nn.Flatten(),
        nn.Linear(4, 5, bias=False),
        nn.Linear(5, 4),
    )


def seeded(build) -> nn.Module:
    """The model with weights, and running statistics, that are its own."""
    torch.manual_seed(7)
    model = build()
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 2)
    return model


def make_images(count: int = 10, classes: int = 4) -> ImageSet:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, 2, 6, 6), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, classes, (count,), generator=generator)
    names = tuple("abcdefgh"[:classes])
    return ImageSet(
        "fit", names, labels, torch.arange(count), pixels.__getitem__, mean=(0.5,), std=(0.25,)
    )


def save(model: nn.Module, path: Path) -> Path:
    """All tensors under their first names, as a checkpoint has them."""
    tied = {id(p) for p in model.parameters()}
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, nn.Parameter) or id(tensor) in tied:
            state[name] = tensor.detach()
            tied.discard(id(tensor))
    infos = [TensorInfo(name, tuple(t.shape), t.dtype) for name, t in state.items()]
    with CheckpointWriter(path, infos) as writer:
        for name, tensor in state.items():
            writer.write(name, tensor)
    return path


@pytest.fixture
def run(tmp_path):
    """run(kind, build, **settings) → record, tensors: gathers from the seeded model."""
    numbers = itertools.count()

    def run(kind, build, images=None, **changes) -> tuple[dict, dict[str, Tensor]]:
        path = save(seeded(build), tmp_path / f"{build.__name__}.safetensors")
        out = tmp_path / f"{next(numbers)}.safetensors"
        settings = {"memory_budget": BUDGET, "progress": False} | changes
        with open_checkpoint(path) as checkpoint:
            record = gather(
                kind,
                build(),
                checkpoint,
                make_images() if images is None else images,
                out,
                **settings,
            )
        with open_checkpoint(out) as found:
            assert read_record(found) == record
            return record, {name: found.read(name) for name in found.tensors}

    return run


def exact_fisher(model: nn.Module, images: ImageSet, choose) -> dict[str, Tensor]:
    """Σ over images and over (weight, class) of `choose` of weight · ∇² / images, in float64."""
    model = model.double().eval()
    pixels, labels = next(images.batches(len(images)))
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for image, label in zip(pixels.double(), labels.tolist(), strict=True):
        log_p = model(image[None])[0].log_softmax(0)
        for weight, y in choose(log_p.detach().exp(), label):
            gradients = torch.autograd.grad(
                log_p[y], list(model.parameters()), retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(total, gradients, strict=True):
                if gradient is not None:
                    total[name] += weight * gradient**2 / len(pixels)
    return total


def true_label(probabilities: Tensor, label: int) -> list[tuple[float, int]]:
    return [(1.0, label)]


def every_label(probabilities: Tensor, label: int) -> list[tuple[float, int]]:
    return [(float(p), y) for y, p in enumerate(probabilities)]


def close(found: Tensor, wanted: Tensor | np.ndarray, tolerance: float = 1e-5) -> None:
    wanted = np.asarray(wanted, dtype=np.float64)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(
        found.numpy(), wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max()
    )


@pytest.mark.parametrize("build", [convolutional, Branched, Attending])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_fisher_is_the_mean_of_squared_gradients_image_by_image(build, batch_size, run):
    record, found = run("fisher", build, labels="true", batch_size=batch_size)
    wanted = exact_fisher(seeded(build), make_images(), true_label)
    assert found.keys() - {"classes.weight"} == wanted.keys()
    for name, values in wanted.items():
        close(found[name], values)
    assert bool(record["one_by_one"]) == (build is Branched)
    norm = sum(float((v**2).sum()) for v in wanted.values()) ** 0.5
    assert record["norm"] == pytest.approx(norm, rel=1e-5)


def test_it_is_not_the_square_of_the_mean_gradient(run):
    """What a batch's own gradient would give is far from the right thing."""
    model, images = seeded(convolutional).eval(), make_images()
    _, found = run("fisher", convolutional, labels="true")
    pixels, labels = next(images.batches(len(images)))
    F.cross_entropy(model(pixels), labels).backward()
    gradient = model.get_parameter("7.weight").grad
    assert gradient is not None
    assert float(gradient.square().sum()) < 0.7 * float(found["7.weight"].sum())


def test_sampled_labels_follow_the_models_own_softmax(run):
    """The mean over seeds is Σ_y p(y|x) ∇² log p(y|x), which true labels do not give."""
    wanted = exact_fisher(seeded(convolutional), make_images(), every_label)
    wrong = exact_fisher(seeded(convolutional), make_images(), true_label)
    draws = [run("fisher", convolutional, seed=seed)[1] for seed in range(60)]
    for name in ("7.bias", "0.bias", "7.weight"):
        stacked = torch.stack([draw[name].double() for draw in draws])
        error = stacked.std(0) / len(draws) ** 0.5
        assert bool(((stacked.mean(0) - wanted[name]).abs() < 4 * error).all())
        assert bool(((stacked.mean(0) - wrong[name]).abs() > 6 * error).any())


def test_a_seed_decides_labels_and_images_and_nothing_else_does(run):
    _, found = run("fisher", convolutional, seed=3, examples=6)
    for changes in ({"batch_size": 1}, {"batch_size": 4}, {"memory_budget": 8000}):
        _, again = run("fisher", convolutional, seed=3, examples=6, **changes)
        for name, values in found.items():
            close(again[name], values)
    _, other = run("fisher", convolutional, seed=4, examples=6)
    assert any(not torch.allclose(other[n], v, rtol=1e-2) for n, v in found.items())


def test_the_same_run_gives_the_same_bytes(tmp_path, run):
    for kind in ("fisher", "gram"):
        run(kind, convolutional, seed=3)
        run(kind, convolutional, seed=3)
    files = [(tmp_path / f"{k}.safetensors").read_bytes() for k in range(4)]
    assert files[0] == files[1]
    assert files[2] == files[3]


def test_a_budget_for_one_gradient_is_kept(run):
    record, found = run("fisher", convolutional, labels="true", memory_budget=3600)
    assert record["one_by_one"] == "memory_budget"
    wanted = exact_fisher(seeded(convolutional), make_images(), true_label)
    for name, values in wanted.items():
        close(found[name], values)


def products(rows: np.ndarray) -> np.ndarray:
    """Σ xᵀx / rows, one row at a time."""
    total = np.zeros((rows.shape[1], rows.shape[1]))
    for row in rows:
        total += np.outer(row, row)
    return total / len(rows)


def patches(image: np.ndarray, kernel: int, stride: int, padding: int) -> list[np.ndarray]:
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
    places = range(0, padded.shape[1] - kernel + 1, stride)
    return [padded[:, y : y + kernel, x : x + kernel].ravel() for y in places for x in places]


@pytest.mark.parametrize("batch_size", [3, 64])
def test_grams_are_the_products_of_inputs_and_of_patches(batch_size, run):
    record, found = run("gram", convolutional, batch_size=batch_size)
    model, images = seeded(convolutional).double().eval(), make_images()
    pixels = next(images.batches(len(images)))[0].double()
    with torch.no_grad():
        inputs = {f"{k}.weight": model[:k](pixels).numpy() for k in (0, 6, 7)}
    rows = [patch for image in inputs["0.weight"] for patch in patches(image, 3, 2, 1)]
    inputs["0.weight"] = np.stack(rows)
    assert found.keys() == inputs.keys()  # not 4: its groups are no linear layer
    for name, values in inputs.items():
        close(found[name], products(values))
    assert record["rows"] == {name: len(values) for name, values in inputs.items()}
    assert record["rows"]["0.weight"] == 10 * 9


@pytest.mark.parametrize("batch_first", [True, False])
def test_grams_of_torchs_own_attention(batch_first, run, monkeypatch):
    def build() -> nn.Module:
        model = Attending()
        model.attention.batch_first = batch_first
        return model

    record, found = run("gram", build)
    model = seeded(build).double().eval()
    pixels = next(make_images().batches(10))[0].double()
    a, size = model.attention, 8
    with torch.no_grad():
        tokens = model.embed(pixels.flatten(2).mT)
        sequence = tokens if batch_first else tokens.transpose(0, 1)
        q, k, v = (
            part.unflatten(-1, (2, 4)).transpose(1, 2)
            for part in F.linear(sequence, a.in_proj_weight, a.in_proj_bias).chunk(3, -1)
        )
        heads = ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).reshape(-1, size)
        pooled = (tokens + a(tokens, tokens, tokens)[0]).mean(1)
    assert record["rows"]["attention.in_proj_weight"] == 360
    close(found["attention.in_proj_weight"], products(tokens.reshape(-1, size).numpy()))
    close(found["attention.out_proj.weight"], products(heads.numpy()))
    close(found["head.weight"], products(pooled.numpy()))
    assert torch.equal(found["classes.weight"], found["head.weight"])  # tied: either name will do


def test_several_passes_give_the_same_bits(run, monkeypatch):
    passes = []
    own = ImageSet.batches

    def counted(self, *args, **settings):
        passes.append(self)
        return own(self, *args, **settings)

    monkeypatch.setattr(ImageSet, "batches", counted)
    record, whole = run("gram", convolutional)
    assert len(passes) == 1
    weights = sum(t.numel() * t.element_size() for t in seeded(convolutional).state_dict().values())
    largest = 12 * 18**2
    again, parts = run("gram", convolutional, memory_budget=weights + largest)
    assert len(passes) == 1 + 2
    assert again == record
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    with pytest.raises(MergeError, match=r"memory_budget: the Gram matrix of '0.weight' needs"):
        run("gram", convolutional, memory_budget=weights + largest - 1)


def test_a_layer_that_is_never_called_is_named(run):
    dark = make_images()
    record, found = run("gram", Branched, dark.subset(torch.tensor([0])))
    assert len(found) == 1
    assert {*found, *record["unseen"]} == {"bright.weight", "dark.weight"}


def test_gathered_statistics_merge(run):
    """The chain: two models, their statistics, one merged layer that fits both."""
    record, found = run("gram", convolutional)
    _, weights = run("fisher", convolutional, labels="true")
    state = seeded(convolutional).state_dict()
    for method, statistics in (("regmean", found), ("fisher", weights)):
        tensors = [state["6.weight"], state["6.weight"] + 1]
        merged = METHODS[method](None, tensors, statistics=[statistics["6.weight"]] * 2)
        torch.testing.assert_close(merged, tensors[0] + 0.5)
    assert record["kind"] == "gram"


def test_the_record_says_what_the_statistics_belong_to(tmp_path, run):
    record, _ = run("fisher", convolutional, examples=6, seed=5)
    path = tmp_path / "convolutional.safetensors"
    with open_checkpoint(path) as checkpoint:
        digest = scan(checkpoint).sha256
    assert record["images_sha256"] != run("fisher", convolutional)[0]["images_sha256"]
    expected = {
        "kind": "fisher",
        "checkpoint": str(path),
        "sha256": digest,
        "images": "fit",
        "examples": 6,
        "seed": 5,
        "labels": "sampled",
    }
    assert {key: record[key] for key in expected} == expected
    with open_checkpoint(tmp_path / "0.safetensors") as statistics:
        assert check_statistics(statistics, "fisher", sha256=digest) == record
        with pytest.raises(MergeError, match="of kind 'fisher', wanted 'gram'"):
            check_statistics(statistics, "gram")
        with pytest.raises(MergeError, match="with other weights"):
            check_statistics(statistics, "fisher", sha256="0" * 64)
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt")
    for other in (path, tmp_path / "w.pt"):
        with open_checkpoint(other) as checkpoint, pytest.raises(MergeError, match="is no file of"):
            check_statistics(checkpoint, "fisher")


def test_load_weights_is_strict_and_takes_one_name_of_a_tied_tensor(tmp_path):
    path = save(seeded(Attending), tmp_path / "a.safetensors")
    with open_checkpoint(path) as checkpoint:
        assert "classes.weight" not in checkpoint.tensors
        model = Attending()
        load_weights(model, checkpoint)
        for name, tensor in seeded(Attending).state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor)
        with pytest.raises(MergeError) as error:
            load_weights(convolutional(), checkpoint)
    for wanted in ("'0.weight' is missing", "'embed.bias' is not in the model", "choose the check"):
        assert wanted in str(error.value)
    path = save(nn.Linear(3, 2), tmp_path / "b.safetensors")
    with (
        open_checkpoint(path) as checkpoint,
        pytest.raises(MergeError, match=r"'weight' is \[2, 3\], the model has \[2, 4\]"),
    ):
        load_weights(nn.Linear(4, 2), checkpoint)


def nan_weight() -> nn.Module:
    model = convolutional()
    model[6].weight.data[0, 0] = torch.nan
    return model


def test_what_is_wrong_is_said_and_nothing_is_left(tmp_path, run):
    def fails(message: str, *arguments, **changes) -> None:
        with pytest.raises(MergeError, match=message):
            run(*arguments, **changes)

    fails("has 0 images", "gram", convolutional, make_images().subset(torch.tensor([]).long()))
    fails("of which 0|which all are wanted in batches of 0", "gram", convolutional, batch_size=0)
    fails("labels from 0 to 5.*knows 4", "fisher", convolutional, make_images(40, 6), labels="true")
    fails(r"gives \[1, 4, 3, 3\] for one image", "fisher", only_convolution)
    fails("has no linear layer", "gram", only_norm)
    fails("memory_budget: the Fisher information", "fisher", convolutional, memory_budget=1000)
    fails("statistics of '.*' on fit are not finite", "fisher", nan_weight)
    fails("statistics of '7.weight' on fit are not finite", "gram", nan_weight)
    written = {f.name for f in tmp_path.iterdir()}
    assert written == {
        f"{name}.safetensors"
        for name in ("convolutional", "nan_weight", "only_convolution", "only_norm")
    }
    path = tmp_path / "convolutional.safetensors"
    before = path.read_bytes()
    with open_checkpoint(path) as checkpoint:
        for out, found in ((path, "the checkpoint itself"), (tmp_path, "a folder")):
            with pytest.raises(MergeError, match=f"is {found}"):
                gather(
                    "gram", convolutional(), checkpoint, make_images(), out, memory_budget=BUDGET
                )
    assert path.read_bytes() == before


def only_convolution() -> nn.Module:
    return nn.Conv2d(2, 4, 3, stride=2, padding=1)


def only_norm() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
