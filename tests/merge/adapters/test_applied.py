"""A base with an adapter on it: exact, the same bits in slices, and the right base."""

import numpy as np
import pytest
import torch

from merge.adapters import applied, open_adapter
from merge.checkpoints import open_checkpoint, scan
from merge.errors import MergeError


def oracle(w: np.ndarray, b: np.ndarray, a: np.ndarray, scaling: float) -> np.ndarray:
    """`W + s·B·A` in float64, entry by entry."""
    result = w.astype(np.float64)
    for i in range(b.shape[0]):
        for j in range(a.shape[1]):
            result[i, j] += scaling * sum(
                float(b[i, k]) * float(a[k, j]) for k in range(a.shape[0])
            )
    return result


@pytest.mark.parametrize(("rows", "columns", "rank"), [(5, 4, 2), (1, 7, 2), (6, 1, 1), (1, 1, 2)])
def test_a_linear_module(write_adapter, write_base, lora, rows: int, columns: int, rank: int):
    factors = lora("l.0.q", rows, columns, rank)
    a, b = (factors[f"base_model.model.l.0.q.lora_{side}.weight"].numpy() for side in "AB")
    path = write_base({"l.0.q.weight": (rows, columns), "norm.weight": (3,), "scale": ()})
    with open_checkpoint(path) as base:
        both = applied(base, open_adapter(write_adapter("a", factors, r=rank, lora_alpha=3)))
        wanted = oracle(base.read("l.0.q.weight").numpy(), b, a, 3 / rank)
        found = both.read("l.0.q.weight")
        np.testing.assert_allclose(found.double().numpy(), wanted, rtol=1e-5, atol=1e-6)
        assert torch.equal(both.read("norm.weight"), base.read("norm.weight"))
        assert torch.equal(both.read("scale"), base.read("scale"))
        assert both.tensors == base.tensors
        assert both.path == f"{path}+{path.parent / 'a'}"
        assert {f.name for f in both.files} == {"base.safetensors", "adapter_model.safetensors"}


def test_its_home_is_the_bases(write_adapter, write_base, lora, tmp_path) -> None:
    adapter = write_adapter("a_first", lora("q", 4, 3))
    (tmp_path / "z_last").mkdir()
    path = write_base({"q.weight": (4, 3)}, name="z_last/base")
    with applied(open_checkpoint(path), open_adapter(adapter)) as both:
        assert both.home == tmp_path / "z_last"
        assert both.files == (path, adapter / "adapter_model.safetensors")


def test_a_convolution(write_adapter, write_base) -> None:
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(2, 3, 3, 2, generator=draw)
    b = torch.randn(5, 2, 1, 1, generator=draw)
    names = ("base_model.model.c.lora_A.weight", "base_model.model.c.lora_B.weight")
    adapter = open_adapter(write_adapter("a", dict(zip(names, (a, b), strict=True))))
    with open_checkpoint(write_base({"c.weight": (5, 3, 3, 2)})) as base:
        w = base.read("c.weight").numpy().reshape(5, -1)
        wanted = oracle(w, b.numpy().reshape(5, 2), a.numpy().reshape(2, -1), 2.0)
        found = applied(base, adapter).read("c.weight")
        assert found.shape == (5, 3, 3, 2)
        np.testing.assert_allclose(found.double().numpy().reshape(5, -1), wanted, rtol=1e-5)


def test_an_embedding_and_a_bias_of_lora_b(write_adapter, write_base, lora) -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "base_model.model.e.lora_embedding_A": torch.randn(2, 9, generator=draw),
        "base_model.model.e.lora_embedding_B": torch.randn(3, 2, generator=draw),
        **lora("q", 4, 3),
        "base_model.model.q.lora_B.bias": torch.randn(4, generator=draw),
    }
    adapter = open_adapter(write_adapter("a", tensors))
    with open_checkpoint(
        write_base({"e.weight": (9, 3), "q.weight": (4, 3), "q.bias": (4,)})
    ) as base:
        both = applied(base, adapter)
        a, b = (tensors[f"base_model.model.e.lora_embedding_{side}"].numpy() for side in "AB")
        wanted = oracle(base.read("e.weight").numpy(), a.T, b.T, 2.0)
        np.testing.assert_allclose(both.read("e.weight").double().numpy(), wanted, rtol=1e-5)
        bias = base.read("q.bias").double() + 2.0 * tensors["base_model.model.q.lora_B.bias"]
        np.testing.assert_allclose(both.read("q.bias").numpy(), bias.numpy(), rtol=1e-6)


@pytest.mark.parametrize("shapes", [{"c": (4, 6)}, {"c": (4, 4), "x.c": (2, 5)}])
def test_weights_stored_with_inputs_first(write_adapter, write_base, lora, shapes: dict) -> None:
    """GPT-2's Conv1D: by shape, and a square one by the bias of its namesake."""
    module, (inputs, outputs) = "h.c", shapes["c"]
    sizes = {f"h.{name}.weight": shape for name, shape in shapes.items()}
    sizes |= {f"h.{name}.bias": shape[1:] for name, shape in shapes.items()}
    factors = lora(module, outputs, inputs)
    a, b = (factors[f"base_model.model.{module}.lora_{side}.weight"].numpy() for side in "AB")
    with open_checkpoint(write_base(sizes)) as base:
        both = applied(base, open_adapter(write_adapter("a", factors)))
        wanted = oracle(base.read("h.c.weight").numpy(), a.T, b.T, 2.0)
        np.testing.assert_allclose(both.read("h.c.weight").double().numpy(), wanted, rtol=1e-5)


def test_a_square_weight_follows_fan_in_fan_out(write_adapter, write_base, lora) -> None:
    factors = lora("c", 3, 3)
    with open_checkpoint(write_base({"c.weight": (3, 3)})) as base:
        plain = applied(base, open_adapter(write_adapter("a", factors))).read("c.weight")
        crossed = applied(base, open_adapter(write_adapter("b", factors, fan_in_fan_out=True)))
        w = base.read("c.weight")
        torch.testing.assert_close(crossed.read("c.weight") - w, (plain - w).T)


def test_slices_have_the_bits_of_the_whole(write_adapter, write_base, lora) -> None:
    shape = (701, 389)  # several blocks, the last of them not full
    adapter = open_adapter(write_adapter("a", lora("q", *shape, 5), r=5))
    with open_checkpoint(write_base({"q.weight": shape})) as base:
        both = applied(base, adapter)
        whole = both.read("q.weight").reshape(-1)
        draw = np.random.default_rng(0)
        ends = np.sort(draw.integers(0, whole.numel(), (60, 2)), axis=1).tolist()
        for start, stop in [*ends, [0, 1], [whole.numel() - 1, whole.numel()], [7, 7]]:
            assert torch.equal(both.read("q.weight", start=start, stop=stop), whole[start:stop])
        out = torch.empty(389, 3, dtype=torch.float64)
        both.read("q.weight", out=out, start=1000, stop=1000 + out.numel())
        assert torch.equal(out.reshape(-1), whole[1000 : 1000 + out.numel()].double())


def test_bf16_is_rounded_once_and_float32_keeps_small_changes(
    write_adapter, write_base, lora
) -> None:
    weight = torch.full((5, 4), 8.0, dtype=torch.bfloat16)
    factors = {name: factor * 1e-3 for name, factor in lora("q", 5, 4).items()}
    adapter = open_adapter(write_adapter("a", factors))
    with open_checkpoint(write_base({}, **{"q.weight": weight})) as base:
        b, a = adapter.factors("q")
        rounded, kept = applied(base, adapter), applied(base, adapter, dtype=torch.float32)
        assert rounded.tensors["q.weight"].dtype == torch.bfloat16
        assert torch.equal(rounded.read("q.weight"), weight)
        assert rounded.read("q.weight", out=torch.empty(20)).unique().tolist() == [8.0]
        found = kept.read("q.weight")
        assert found.dtype == kept.tensors["q.weight"].dtype == torch.float32
        torch.testing.assert_close(found, 8 + 2 * b @ a, rtol=1e-6, atol=0)
        assert scan(kept).nonfinite == {}


def test_tensors_stored_whole_replace_resize_and_add(write_adapter, write_base, lora) -> None:
    new = {"e.weight": torch.ones(11, 3), "n.weight": torch.ones(3), "head.weight": torch.ones(2)}
    tensors = {**lora("q", 4, 3), **{f"base_model.model.{n}": t for n, t in new.items()}}
    adapter = open_adapter(write_adapter("a", tensors, modules_to_save=["e", "n", "head"]))
    shapes = {"e.weight": (9, 3), "n.weight": (3,), "q.weight": (4, 3)}
    with open_checkpoint(write_base(shapes)) as base:
        both = applied(base, adapter)
        for name, tensor in new.items():
            assert torch.equal(both.read(name), tensor)
        assert both.tensors["e.weight"].shape == (11, 3)
        notes = "\n".join(both.notes)
        assert "replaced by what the adapter stores whole: 2: 'e.weight', 'n.weight'" in notes
        assert "of another shape than in the base: 1: 'e.weight'" in notes
        assert "added by the adapter, not in the base: 1: 'head.weight'" in notes


@pytest.mark.parametrize(
    ("module", "held"),
    [
        ("model.l.0.q", "l.0.q.weight"),
        ("l.0.q", "transformer.l.0.q.weight"),
        ("a.b.l.0.q", "l.0.q.weight"),
    ],
)
def test_prefixes_may_differ(write_adapter, write_base, lora, module: str, held: str) -> None:
    adapter = open_adapter(write_adapter("a", lora(module, 4, 3)))
    with open_checkpoint(write_base({held: (4, 3), "z": (2,)})) as base:
        both = applied(base, adapter)
        b, a = adapter.factors(module)
        torch.testing.assert_close(both.read(held), base.read(held) + 2 * b @ a)
        assert any("prefix" in note for note in both.notes)


def test_another_base_is_refused(write_adapter, write_base, lora) -> None:
    path = write_adapter("a", lora("l.5.q", 4, 3), base_model_name_or_path="org/seven")
    adapter = open_adapter(path)

    def refused(shapes: dict, **made) -> str:
        with (
            open_checkpoint(write_base(shapes, **made)) as base,
            pytest.raises(MergeError) as error,
        ):
            applied(base, adapter)
        assert str(path) in str(error.value)
        assert "base.safetensors" in str(error.value)
        return str(error.value)

    assert "'l.5.q'), which was trained on 'org/seven'" in refused({"l.4.q.weight": (4, 3)})
    assert "no tensor for 1 of 1 modules" in refused({"q.weight": (4, 3)})
    assert "is [4, 5], the adapter" in refused({"l.5.q.weight": (4, 5)})
    assert "is [4], the adapter" in refused({"l.5.q.weight": (4,)})
    assert "in 2 places" in refused({"x.l.5.q.weight": (4, 3), "y.l.5.q.weight": (4, 3)})
    packed = torch.zeros(4, 3, dtype=torch.uint8)
    assert "uint8, quantised" in refused({}, **{"l.5.q.weight": packed})
    with open_checkpoint(write_base({"l.5.q.weight": (4, 3)})) as base:
        assert any("names 'org/seven'" in note for note in applied(base, adapter).notes)


def test_grouped_convolutions_are_refused(write_adapter, write_base) -> None:
    tensors = {
        "base_model.model.c.lora_A.weight": torch.ones(2, 6, 3, 3),
        "base_model.model.c.lora_B.weight": torch.ones(6, 1, 1, 1),
    }
    with pytest.raises(MergeError, match=r"wanted .rank"):
        open_adapter(write_adapter("a", tensors))
    tensors["base_model.model.c.lora_B.weight"] = torch.ones(6, 2, 1, 1)
    with (
        open_checkpoint(write_base({"c.weight": (6, 3, 3, 3)})) as base,
        pytest.raises(MergeError, match="grouped convolution"),
    ):
        applied(base, open_adapter(write_adapter("b", tensors)))


def test_tied_tensors_that_are_changed_are_no_longer_tied(tmp_path, write_adapter, lora) -> None:
    tied = torch.ones(4, 3)
    torch.save({"q.weight": tied, "p.weight": tied, "z": torch.ones(1)}, tmp_path / "base.pt")
    with open_checkpoint(tmp_path / "base.pt") as base:
        assert base.shared == (("p.weight", "q.weight"),)
        both = applied(base, open_adapter(write_adapter("a", lora("q", 4, 3))))
        assert both.shared == ()
        assert any("no longer tied: 2: 'p.weight', 'q.weight'" in note for note in both.notes)


def test_two_adapters_one_on_the_other(write_adapter, write_base, lora) -> None:
    first = open_adapter(write_adapter("a", lora("q", 4, 3)))
    second = open_adapter(write_adapter("b", lora("q", 4, 3, seed=1)))
    with open_checkpoint(write_base({"q.weight": (4, 3)})) as base:
        both = applied(applied(base, first), second)
        wanted = base.read("q.weight").double()
        for adapter in (first, second):
            b, a = adapter.factors("q", dtype=torch.float64)
            wanted += 2 * b @ a
        torch.testing.assert_close(both.read("q.weight").double(), wanted, rtol=1e-5, atol=1e-6)
        assert both.path.count("+") == 2


def test_wrong_reads_are_refused(write_adapter, write_base, lora) -> None:
    adapter = open_adapter(write_adapter("a", lora("q", 4, 3)))
    with open_checkpoint(write_base({"q.weight": (4, 3)})) as base:
        both = applied(base, adapter)
        with pytest.raises(MergeError, match=r"nearest name is 'q.weight'"):
            both.read("q.weigth")
        with pytest.raises(MergeError, match="outside of it"):
            both.read("q.weight", start=5, stop=13)
        with pytest.raises(MergeError, match="contiguous one with 12"):
            both.read("q.weight", out=torch.empty(5))
