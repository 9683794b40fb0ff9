"""Domains: planted clusters are found again."""

import pytest
import torch
from safetensors.torch import save_file

from fleet.errors import FleetError
from fleet.storage.domains import (
    Distances,
    Domain,
    delta_distances,
    find_domains,
    given_domains,
    home_of,
)
from fleet.storage.zoo import Zoo
from merge.checkpoints import open_checkpoint

SHAPES = {
    "blocks.0.weight": (24, 40),
    "blocks.0.bias": (24,),
    "blocks.1.weight": (40, 24),
    "norm.weight": (40,),
    "head.weight": (10, 40),
}


def normal(seed, size=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        key: (size * torch.randn(shape, generator=generator)).to(dtype)
        for key, shape in SHAPES.items()
    }


def total(*models, dtype=torch.float32):
    return {key: sum(model[key].float() for model in models).to(dtype) for key in SHAPES}


@pytest.fixture
def write(tmp_path):
    """Writes a base and variants given as deltas; opens the zoo."""
    opened = []

    def zoo(deltas, dtype=torch.float32, base=None):
        base = normal(0, dtype=dtype) if base is None else base
        save_file(base, tmp_path / "base.safetensors")
        paths = {}
        for name, delta in deltas.items():
            paths[name] = tmp_path / f"{name}.safetensors"
            save_file(total(base, delta, dtype=dtype), paths[name])
        opened.append(Zoo(lambda: open_checkpoint(tmp_path / "base.safetensors"), paths))
        return opened[-1]

    yield zoo
    for one in opened:
        one.close()


def planted(clusters=3, each=4, noise=0.5, size=0.01):
    """Variants in turn of each cluster: what it shares, and noise of their own."""
    centres = [normal(100 + c, size) for c in range(clusters)]
    return {
        f"v{i}-{c}": total(centres[c], normal(1000 + 10 * c + i, noise * size))
        for i in range(each)
        for c in range(clusters)
    }


def groups(domains):
    return sorted(sorted(domain.variants) for domain in domains)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [None, 3])
def test_planted_clusters_are_found(write, dtype, count):
    zoo = write(planted(size=0.3), dtype=dtype)
    distances = delta_distances(zoo, memory_budget=1 << 24)
    domains = find_domains(distances, zoo.names, count=count)
    assert groups(domains) == [[f"v{i}-{c}" for i in range(4)] for c in range(3)]
    assert all(domain.parent == "base" for domain in domains)
    # Within: cos = 1 / (1 + 0.25); between: none.
    assert float(distances.matrix[0, 3]) == pytest.approx(0.2, abs=0.06)
    assert float(distances.matrix[0, 1]) == pytest.approx(1, abs=0.15)


def test_a_tree_is_found(write):
    """Two families, one of which has two branches."""
    family, other = normal(1, 0.01), normal(2, 0.01)
    branches = [total(family, normal(10 + b, 0.006)) for b in range(2)]
    deltas = {f"a{b}{i}": total(branches[b], normal(50 + 3 * b + i, 0.002))
              for b in range(2) for i in range(3)}  # fmt: skip
    deltas |= {f"b{i}": total(other, normal(90 + i, 0.004)) for i in range(3)}
    zoo = write(deltas)
    domains = find_domains(delta_distances(zoo, memory_budget=1 << 24), zoo.names)
    assert [(d.name, d.parent, d.variants) for d in domains] == [
        ("domain-1", "base", ("a00", "a01", "a02", "a10", "a11", "a12")),
        ("domain-1-1", "domain-1", ("a00", "a01", "a02")),
        ("domain-1-2", "domain-1", ("a10", "a11", "a12")),
        ("domain-2", "base", ("b0", "b1", "b2")),
    ]
    assert [home_of(domains, name) for name in ("a00", "a12", "b1")] == [
        "domain-1-1",
        "domain-1-2",
        "domain-2",
    ]


def test_what_shares_nothing_is_in_no_domain(write):
    zoo = write({f"v{i}": normal(i + 5, 0.01) for i in range(6)})
    distances = delta_distances(zoo, memory_budget=1 << 24)
    assert find_domains(distances, zoo.names) == []
    assert home_of([], "v0") == "base"


def test_copies_of_the_base_are_in_no_domain(write):
    zero = {key: torch.zeros(shape) for key, shape in SHAPES.items()}
    zoo = write({"copy": zero, **planted(clusters=1, each=3), "other copy": zero})
    distances = delta_distances(zoo, memory_budget=1 << 24)
    assert distances.moved == (False, True, True, True, False)
    assert groups(find_domains(distances, zoo.names)) == [["v0-0", "v1-0", "v2-0"]]


def test_a_variant_that_is_not_finite_is_in_no_domain(write):
    deltas = planted(clusters=1, each=3)
    deltas["broken"] = {**normal(7), "norm.weight": torch.full((40,), torch.nan)}
    zoo = write(deltas)
    distances = delta_distances(zoo, memory_budget=1 << 24)
    assert groups(find_domains(distances, zoo.names)) == [["v0-0", "v1-0", "v2-0"]]


def test_layers_that_are_as_in_the_base_do_not_count(write):
    """Variants that train one layer only are as near as that layer is."""
    deltas = {
        name: {k: v if k == "head.weight" else torch.zeros_like(v) for k, v in delta.items()}
        for name, delta in planted(clusters=2, each=2).items()
    }
    zoo = write(deltas)
    matrix = delta_distances(zoo, memory_budget=1 << 24).matrix
    assert float(matrix[0, 2]) == pytest.approx(0.2, abs=0.15)


def test_distances_are_the_same_whatever_the_budget(write):
    zoo = write(planted())
    whole = delta_distances(zoo, memory_budget=1 << 28)
    read = []
    sliced = delta_distances(zoo, memory_budget=(1 << 18), advance=read.append)
    torch.testing.assert_close(sliced.matrix, whole.matrix)
    numel = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    assert sum(read) == 12 * 4 * numel  # every variant once
    again = delta_distances(zoo, memory_budget=1 << 28)
    assert torch.equal(again.matrix, whole.matrix)


def test_heads_of_their_own_do_not_count(write, tmp_path):
    zoo = write(planted(clusters=1, each=2))
    save_file(
        {**total(normal(0), normal(9, 0.01)), "head.weight": torch.zeros(3, 40)},
        tmp_path / "own.safetensors",
    )
    own = Zoo(zoo._open_base, {**zoo.paths, "own": tmp_path / "own.safetensors"})
    with own:
        assert own.comparable() == sorted(SHAPES.keys() - {"head.weight"})
        assert delta_distances(own, memory_budget=1 << 24).matrix.shape == (3, 3)


def test_a_budget_that_is_too_small_says_so(write):
    zoo = write(planted())
    with pytest.raises(FleetError, match=r"memory_budget: 1.00 KiB .* compare 12 variants, wanted"):
        delta_distances(zoo, memory_budget=1 << 10)


def test_many_files_are_open_a_few_at_a_time(write, monkeypatch):
    monkeypatch.setattr("fleet.storage.zoo.OPEN_AT_ONCE", 2)
    zoo = write(planted())
    distances = delta_distances(zoo, memory_budget=1 << 24)
    assert len(zoo._open) <= 2
    assert len(find_domains(distances, zoo.names)) == 3


def test_given_domains():
    names = ("a", "b", "c", "d")
    assert given_domains({"x": ["c", "a"], "y": ["b"], "z": []}, names) == [
        Domain("x", "base", ("a", "c")),
        Domain("y", "base", ("b",)),
    ]
    with pytest.raises(FleetError, match=r"domains.x: there is no variant 'aa'; did you mean 'a'"):
        given_domains({"x": ["aa"]}, names)
    with pytest.raises(FleetError, match=r"domains.y: 'a' is in 'x' too"):
        given_domains({"x": ["a"], "y": ["a"]}, names)
    with pytest.raises(FleetError, match="base's own name"):
        given_domains({"base": ["a"]}, names)


def test_counts_of_domains():
    matrix = torch.full((4, 4), 0.9, dtype=torch.float64).fill_diagonal_(0)
    matrix[0, 1] = matrix[1, 0] = 0.1
    distances = Distances(matrix, (True,) * 4)
    assert groups(find_domains(distances, "abcd", count=1)) == [["a", "b", "c", "d"]]
    assert groups(find_domains(distances, "abcd", count=4)) == []
    with pytest.raises(FleetError, match="found 0"):
        find_domains(distances, "abcd", count=0)
    assert find_domains(Distances(matrix[:1, :1], (True,)), "a") == []


def test_a_long_chain_is_no_recursion():
    """Every merge of the dendrogram adds one variant."""
    count = 1500
    places = torch.arange(count, dtype=torch.float64)
    matrix = torch.maximum(places[:, None], places) / count
    matrix.fill_diagonal_(0)
    names = [f"v{i}" for i in range(count)]
    domains = find_domains(Distances(matrix, (True,) * count), names)
    assert 1 <= len(domains) <= 11
