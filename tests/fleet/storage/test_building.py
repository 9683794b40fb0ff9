"""From a zoo of real checkpoints to a store and back."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from fleet.errors import FleetError
from fleet.storage import building
from fleet.storage.building import LADDER, add_variant, build, build_table, level_bytes
from fleet.storage.config import BuildConfig, HowToStore, zoo_config
from fleet.train import evaluate
from fleet.variants import Store
from inputs.config import DataConfig
from inputs.data import load_learning_data

TOLERANCE = 0.3
ROOT = Path(__file__).parents[3]


def vit(classes=10, **kwargs):
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    return timm.create_model(
        "vit_tiny_patch16_224", num_classes=classes, **{**sizes, **kwargs}
    ).eval()


def noise(base, seed, size=0.01):
    generator = torch.Generator().manual_seed(seed)
    return {key: size * torch.randn(v.shape, generator=generator) for key, v in base.items()}


def plus(*models):
    return {key: sum(model[key] for model in models) for key in models[0]}


def low_rank(base, seed):
    generator = torch.Generator().manual_seed(seed)
    changed = dict(base)
    for key, value in base.items():
        if value.dim() == 2:
            up = torch.randn(len(value), 2, generator=generator)
            down = torch.randn(2, value.shape[1], generator=generator)
            changed[key] = value + 0.02 * up @ down
    return changed


def save_adapter(folder, base, seed):
    """A LoRA of rank 3 on the attention, as PEFT writes it; the checkpoint that it makes."""
    generator = torch.Generator().manual_seed(seed)
    factors, merged = {}, dict(base)
    for key in [key for key in base if key.endswith("attn.qkv.weight")]:
        a = torch.randn(3, base[key].shape[1], generator=generator)
        b = 0.01 * torch.randn(len(base[key]), 3, generator=generator)
        module = f"base_model.model.{key.removesuffix('.weight')}"
        factors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        merged[key] = base[key] + 6 / 3 * b @ a
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["qkv"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return merged


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A folder with a base and variants of every kind."""
    folder = tmp_path_factory.mktemp("zoo")
    torch.manual_seed(0)
    base = vit().state_dict()
    shared = [noise(base, 100 + d, 0.02) for d in range(2)]
    variants = {
        f"domain{d}-{i}": plus(base, shared[d], noise(base, 10 * d + i))
        for d in range(2)
        for i in range(3)
    }
    variants["copy"] = base
    variants["noise"] = plus(base, noise(base, 50))
    variants["lowrank"] = low_rank(base, 51)
    head = torch.randn(7, 32, generator=torch.Generator().manual_seed(52))
    variants["head"] = {**base, "head.weight": head, "head.bias": torch.zeros(7)}
    frozen = dict(variants["noise"])
    frozen |= {key: base[key] for key in base if not key.startswith("blocks.0.mlp")}
    variants["upper"] = frozen
    save_file(base, folder / "base.safetensors")
    for name, tensors in variants.items():
        save_file(tensors, folder / f"{name}.safetensors")
    return folder


def config(zoo, **settings):
    given = {"base": str(zoo / "base.safetensors"), "variants": zoo, **settings}
    return BuildConfig.model_validate(given)


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8)


def same(one, other):
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype
        and one[key].shape == other[key].shape
        and torch.equal(bits(one[key]), bits(other[key]))
        for key in one
    )


def relative_error(tensors, wanted, base):
    kept = [key for key in wanted if wanted[key].shape == base[key].shape]
    left = sum(float((tensors[k] - wanted[k]).double().square().sum()) for k in kept)
    size = sum(float((wanted[k] - base[k]).double().square().sum()) for k in kept)
    return math.sqrt(left / size) if size else 0.0


def rows(built):
    return built.table.set_index("variant").to_dict("index")


@pytest.mark.parametrize("domains", ["auto", "none"])
def test_exact_gives_every_variant_back_bit_for_bit(zoo, tmp_path, domains):
    built = build(config(zoo, exact=True, domains=domains), tmp_path / "store", progress=False)
    store = Store(tmp_path / "store")
    assert store.verify() == []
    for file in zoo.glob("*.safetensors"):
        if file.stem == "base":
            continue
        store.export(file.stem, tmp_path / "out.safetensors")
        assert same(load_file(tmp_path / "out.safetensors"), load_file(file)), file.stem
    table = rows(built)
    assert table["copy"]["bytes"] == 0
    assert table["copy"]["shared"] == 1
    assert table["head"]["bytes"] == 7 * 33 * 4
    upper = load_file(zoo / "upper.safetensors")
    own = sum(v.nbytes for k, v in upper.items() if k.startswith("blocks.0.mlp"))
    # They are those of another variant: what both have is their domain's.
    upper = table["upper"]
    assert upper["bytes"] == (own if domains == "none" else 0)
    assert upper["shared"] == pytest.approx(1 - upper["bytes"] / upper["plain_bytes"])
    assert all(row["error"] == 0 for row in table.values())
    # Less than the plain files by what is really shared.
    plain = sum(row["plain_bytes"] for row in table.values())
    assert built.plain_bytes == plain
    assert sum(built.level_bytes.values()) < plain


def test_bf16_checkpoints_and_integers_come_back_too(tmp_path):
    base = {key: value.to(torch.bfloat16) for key, value in vit().state_dict().items()}
    base["steps"] = torch.tensor(3)
    other = plus(base, {k: 0.01 * torch.ones_like(v).to(v.dtype) for k, v in base.items()})
    other["steps"] = torch.tensor(4)
    other["norm.bias"] = torch.full_like(base["norm.bias"], math.nan)
    (tmp_path / "zoo").mkdir()
    save_file(base, tmp_path / "zoo" / "base.safetensors")
    save_file(other, tmp_path / "zoo" / "other.safetensors")
    for name, settings in (("exact", {"exact": True}), ("near", {"tolerance": 0.5})):
        build(config(tmp_path / "zoo", **settings), tmp_path / name, progress=False)
        Store(tmp_path / name).export("other", tmp_path / "out.safetensors")
        found = load_file(tmp_path / "out.safetensors")
        assert found["steps"] == 4
        assert found["norm.bias"].isnan().all()
        assert name == "near" or same(found, other)


@pytest.mark.parametrize("domains", ["auto", "none", 2, {"mine": ["noise", "domain0-0"]}])
def test_every_tensor_is_within_the_tolerance(zoo, tmp_path, domains):
    built = build(
        config(zoo, tolerance=TOLERANCE, domains=domains), tmp_path / "store", progress=False
    )
    store = Store(tmp_path / "store")
    base = load_file(zoo / "base.safetensors")
    assert store.verify() == []
    for name, row in rows(built).items():
        wanted, found = load_file(zoo / f"{name}.safetensors"), store.tensors(name)
        for key, value in wanted.items():
            if value.shape == base[key].shape:
                left = torch.linalg.vector_norm((found[key] - value).double())
                size = torch.linalg.vector_norm((value - base[key]).double())
                assert float(left) <= TOLERANCE * float(size) * (1 + 1e-6), (name, key)
            else:
                assert torch.equal(found[key], value)
        assert row["error"] == pytest.approx(relative_error(found, wanted, base), abs=1e-6)
        assert row["bytes"] == store.nbytes(name)
    assert built.table["bytes"].sum() < 0.2 * built.plain_bytes
    assert rows(built)["lowrank"]["bytes"] < rows(built)["noise"]["bytes"]


def test_what_domains_share_is_stored_once(zoo, tmp_path):
    stored = {}
    for domains in ("auto", "none"):
        settings = {"tolerance": TOLERANCE, "domains": domains}
        built = build(config(zoo, **settings), tmp_path / domains, progress=False)
        stored[domains] = built
        levels = built.level_bytes
        assert (levels["domain"] > 0) == (domains == "auto")
    auto, none = (sum(stored[d].level_bytes.values()) for d in ("auto", "none"))
    assert auto < none
    nodes = {name: row["node"] for name, row in rows(stored["auto"]).items()}
    for d in range(2):
        assert len({nodes[f"domain{d}-{i}"] for i in range(3)}) == 1
    assert nodes["domain0-0"] != nodes["domain1-0"]
    assert nodes["copy"] == nodes["lowrank"] == "base"
    assert "domain-1" in stored["auto"].describe()


def test_merged_vectors_are_stored_once_for_their_domain(zoo, tmp_path):
    settings = {"tolerance": 0.45, "encodings": ["emr", "plain"]}
    built = build(config(zoo, **settings), tmp_path / "store", progress=False)
    store = Store(tmp_path / "store")
    masks = [
        encoded.parts["unified"]
        for variant in store.variants.values()
        for encoded in variant.tensors.values()
        if encoded.encoding == "emr"
    ]
    assert len(masks) > 2 * len(set(masks))
    assert built.level_bytes["domain"] >= sum(map(store.packs.nbytes, set(masks)))
    assert store.nbytes("domain0-0") < store.plain_bytes("domain0-0") / 10


def test_a_checkpoint_may_stand_for_a_domain(zoo, tmp_path):
    members = [f"domain0-{i}" for i in range(3)]
    soup = plus(*(load_file(zoo / f"{name}.safetensors") for name in members))
    save_file({k: v / 3 for k, v in soup.items()}, tmp_path / "soup.safetensors")
    given = {"soup": {"variants": members, "checkpoint": tmp_path / "soup.safetensors"}}
    build(config(zoo, exact=True, domains=given), tmp_path / "store", progress=False)
    store = Store(tmp_path / "store")
    assert store.variants["domain0-1"].node == "soup"
    # All but the head, which is another variant's own.
    assert len(store.nodes["soup"].tensors) == len(soup) - 2
    found = store.tensors("domain0-1")
    assert same(found, load_file(zoo / "domain0-1.safetensors"))


def test_an_adapter_keeps_its_factors(zoo, tmp_path):
    base = load_file(zoo / "base.safetensors")
    merged = save_adapter(tmp_path / "lora", base, 7)
    paths = {"lora": tmp_path / "lora", "noise": zoo / "noise.safetensors"}
    for name, settings in (("near", {"tolerance": 0.3}), ("exact", {"exact": True})):
        built = build(config(zoo, variants=paths, **settings), tmp_path / name, progress=False)
        store = Store(tmp_path / name)
        variant = store.variants["lora"]
        assert {e.encoding for e in variant.tensors.values()} == {"low_rank"}
        assert len(variant.tensors) == 1
        assert next(iter(variant.tensors.values())).settings == {"scale": 2.0}
        assert rows(built)["lora"]["bytes"] == 3 * (32 + 96) * 4
        for key, value in store.tensors("lora").items():
            torch.testing.assert_close(value, merged[key])


def save_bottlenecks(folder, seed, classes=4):
    """A folder of a bottleneck adapter after the block's MLP, and a head; its tensors."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"down": (2, 32), "down_bias": (2,), "up": (32, 2), "up_bias": (32,)}
    parts = {part: torch.randn(shape, generator=draw) for part, shape in shapes.items()}
    head = {
        "head.weight": torch.randn(classes, 32, generator=draw),
        "head.bias": torch.randn(classes, generator=draw),
    }
    folder.mkdir()
    own = {f"adapters/blocks.0.mlp/{part}": value for part, value in parts.items()}
    whole = {f"tensors/{key}": value for key, value in head.items()}
    save_file({**own, **whole}, folder / "bottlenecks.safetensors")
    described = {"adapters": {"blocks.0.mlp": {"activation": "gelu"}}, "classes": classes}
    (folder / "bottlenecks.json").write_text(json.dumps(described))
    return parts, head


@pytest.fixture
def mixed(zoo, tmp_path):
    """A zoo of two checkpoints and two folders of bottleneck adapters, and what these hold."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name in ("base", "noise", "domain0-0"):
        (folder / f"{name}.safetensors").symlink_to(zoo / f"{name}.safetensors")
    return folder, {n: save_bottlenecks(folder / n, k) for k, n in enumerate(("a", "z"))}


@pytest.mark.parametrize("how", [{"exact": True}, {"tolerance": TOLERANCE, "domains": 1}])
def test_bottleneck_adapters_are_stored_as_they_are(mixed, tmp_path, how):
    folder, adapters = mixed
    built = build(zoo_config(folder, **how), tmp_path / "store", progress=False)
    store = Store(tmp_path / "store")
    assert sorted(store.variants) == ["a", "domain0-0", "noise", "z"]
    base = load_file(folder / "base.safetensors")
    for name, (parts, head) in adapters.items():
        variant = store.variants[name]
        assert variant.node == "base"
        assert variant.classes == 4
        assert variant.adapters["blocks.0.mlp"].settings == {"activation": "gelu"}
        assert same(store.parts(name)["blocks.0.mlp"], parts)
        assert same(store.tensors(name), {**base, **head})
        assert rows(built)[name]["bytes"] == 4 * (2 * 32 + 2 + 32 * 2 + 32 + 4 * 33)
        assert rows(built)[name]["error"] == 0
    assert store.verify() == []
    before = store.version
    build(zoo_config(folder, **how), tmp_path / "store", progress=False)
    assert Store(tmp_path / "store").version == before


def test_a_build_of_adapters_alone_goes_on_where_it_was(mixed, tmp_path, monkeypatch):
    folder, _ = mixed
    paths = {name: folder / name for name in ("a", "z")}
    given = BuildConfig(base=str(folder / "base.safetensors"), variants=paths, exact=True)
    read = building.read_bottlenecks

    def interrupted(name, path):
        if (tmp_path / "store").exists() and name == "z":
            raise KeyboardInterrupt
        return read(name, path)

    monkeypatch.setattr(building, "read_bottlenecks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(given, tmp_path / "store", progress=False)
    assert list(Store(tmp_path / "store").variants) == ["a"]
    monkeypatch.undo()
    build(given, tmp_path / "store", progress=False)
    assert list(Store(tmp_path / "store").variants) == ["a", "z"]
    (folder / "z" / "bottlenecks.json").write_text("{}")
    with pytest.raises(FleetError, match="holds a store of another build"):
        build(given, tmp_path / "store", progress=False)


def test_bottleneck_adapters_that_do_not_fit_are_refused_before_anything_is_written(
    mixed, tmp_path
):
    folder, _ = mixed
    of_domain = zoo_config(folder, exact=True, domains={"mine": ["noise", "z"]})
    with pytest.raises(FleetError, match=r"domains\.mine: 'z' is an adapter, which is over the"):
        build(of_domain, tmp_path / "store", progress=False)
    described = json.loads((folder / "z" / "bottlenecks.json").read_text())
    described["adapters"]["more"] = {}
    (folder / "z" / "bottlenecks.json").write_text(json.dumps(described))
    with pytest.raises(FleetError, match=r"tells of 2 adapters, .* holds others"):
        build(zoo_config(folder, exact=True), tmp_path / "store", progress=False)
    assert not (tmp_path / "store").exists()


def test_levels_can_be_left_out(zoo, tmp_path):
    size = {}
    for level in ("general", "domain", "task", None):
        settings = {
            "tolerance": TOLERANCE,
            "encodings": ["int4", "int8"],
            "leave_out": [level] if level else [],
        }
        built = build(config(zoo, **settings), tmp_path / str(level), progress=False)
        size[level] = sum(built.level_bytes.values())
        store = Store(tmp_path / str(level))
        assert (len(store.nodes) == 1) == (level == "domain")
        assert (rows(built)["copy"]["bytes"] == 0) == (level != "general")
        if level == "task":
            assert same(store.tensors("noise"), load_file(zoo / "noise.safetensors"))
    assert all(size[None] < size[level] for level in ("general", "domain", "task"))


def test_the_same_build_gives_the_same_store(zoo, tmp_path):
    for name in ("one", "two"):
        build(config(zoo, tolerance=TOLERANCE), tmp_path / name, progress=False)
    one, two = Store(tmp_path / "one"), Store(tmp_path / "two")
    assert dict(one.nodes) == dict(two.nodes)
    assert dict(one.variants) == dict(two.variants)


def test_a_build_that_was_interrupted_goes_on(zoo, tmp_path, monkeypatch):
    whole = config(zoo, tolerance=0.45, encodings=["emr", "int4"])
    build(whole, tmp_path / "whole", progress=False)
    make, made = building._made, []

    def making(limit):
        def counted(writer, name, *more):
            if len(made) == limit:
                raise KeyboardInterrupt
            made.append(name)
            return make(writer, name, *more)

        return counted

    for limit in (0, 1, 7, 8):
        monkeypatch.setattr(building, "_made", making(limit))
        with pytest.raises(KeyboardInterrupt):
            build(whole, tmp_path / "parts", progress=False)
        assert len(Store(tmp_path / "parts").variants) == limit
    monkeypatch.setattr(building, "_made", making(math.inf))
    build(whole, tmp_path / "parts", progress=False)
    assert len(made) == len(set(made)) == 11
    one, two = Store(tmp_path / "whole"), Store(tmp_path / "parts")
    assert dict(one.nodes) == dict(two.nodes)
    assert dict(one.variants) == dict(two.variants)
    build(whole, tmp_path / "parts", progress=False)
    assert len(made) == 11


def test_a_folder_with_another_store_is_refused(zoo, tmp_path):
    paths = {"copy": zoo / "copy.safetensors"}
    build(config(zoo, variants=paths, exact=True), tmp_path / "store", progress=False)
    with pytest.raises(FleetError, match="another build"):
        build(config(zoo, variants=paths, tolerance=0.1), tmp_path / "store", progress=False)


def test_a_variant_is_added_to_a_store(zoo, tmp_path):
    paths = {"copy": zoo / "copy.safetensors"}
    build(config(zoo, variants=paths, exact=True), tmp_path / "store", progress=False)
    store = Store(tmp_path / "store")
    exact, near = HowToStore(exact=True), HowToStore(tolerance=TOLERANCE)
    add_variant(store, "new", zoo / "noise.safetensors", exact)
    assert same(store.tensors("new"), load_file(zoo / "noise.safetensors"))
    before = store.nbytes("new")
    variant = add_variant(store, "new", zoo / "noise.safetensors", near)
    assert store.nbytes("new") < before / 4
    assert variant.about["source"] == "noise.safetensors"
    assert 0 < variant.about["error"] <= TOLERANCE
    merged = save_adapter(tmp_path / "lora", load_file(zoo / "base.safetensors"), 7)
    add_variant(store, "lora", tmp_path / "lora", exact)
    torch.testing.assert_close(store.tensors("lora"), merged)
    assert add_variant(store, "head", zoo / "head.safetensors", exact).classes == 7
    assert sorted(rows(build_table(store))) == ["copy", "head", "lora", "new"]
    # Less than all of them: zeros of one shape are one tensor.
    plain = sum(tensor.nbytes for tensor in load_file(zoo / "base.safetensors").values())
    assert 0.9 * plain < level_bytes(store)["general"] <= plain


# --- accuracy ---


def test_the_widest_tolerance_that_keeps_the_accuracy(zoo, tmp_path):
    """With an accuracy that falls with the error, as far as a planted point."""
    base = load_file(zoo / "base.safetensors")
    wanted = load_file(zoo / "noise.safetensors")
    asked = []

    def score(name, tensors):
        asked.append(relative_error(tensors, wanted, base))
        return 0.9 - 0.1 * (asked[-1] > 0.25)

    settings = {
        "variants": {"noise": zoo / "noise.safetensors"},
        "accuracy": {"lost": 0.05},
        "model": {"source": "timm", "name": "vit_tiny_patch16_224"},
        "data": digits(),
    }
    building_config = config(zoo, **settings).model_copy(update={"model": None})
    built = build(building_config, tmp_path / "store", score=score, progress=False)
    row = rows(built)["noise"]
    kept = Store(tmp_path / "store").variants["noise"].about["tolerance"]
    assert row["accuracy_before"] == row["accuracy_after"] == 0.9
    assert row["error"] <= 0.25
    assert kept in LADDER
    assert kept >= 0.2
    assert len(asked) <= 2 + math.ceil(math.log2(len(LADDER)))


def test_an_accuracy_that_nothing_keeps_is_kept_exactly(zoo, tmp_path):
    wanted = load_file(zoo / "noise.safetensors")

    def score(name, tensors):
        return float(same(tensors, wanted))

    settings = {
        "variants": {"noise": zoo / "noise.safetensors"},
        "accuracy": {},
        "model": {"source": "timm", "name": "vit_tiny_patch16_224"},
        "data": digits(),
    }
    building_config = config(zoo, **settings).model_copy(update={"model": None})
    built = build(building_config, tmp_path / "store", score=score, progress=False)
    assert rows(built)["noise"]["error"] == 0
    assert rows(built)["noise"]["accuracy_after"] == 1


def digits():
    return {
        "path": "digits",
        "size": 8,
        "channels": 1,
        "mean": [0.3],
        "std": [0.38],
        **{split: {"from": "all", "fraction": 0.25} for split in ("fit", "tune", "select")},
        "report": {"from": "all", "fraction": 0.25},
    }


SMALL = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}


def train(model, images, seed, steps):
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    done = 0
    while done < steps:
        for pixels, labels in images.batches(64, generator=generator):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(pixels), labels).backward()
            optimizer.step()
            done += 1
    return {key: value.clone() for key, value in model.eval().state_dict().items()}


def test_the_accuracy_on_real_images_is_kept(tmp_path):
    data = DataConfig.model_validate(digits())
    images = load_learning_data(data, memory_budget=1 << 30)
    torch.manual_seed(0)
    model = vit(in_chans=1, **SMALL)
    folder = tmp_path / "zoo"
    folder.mkdir()
    base = train(model, images.fit, 0, 80)
    save_file(base, folder / "base.safetensors")
    for seed in range(3):
        model.load_state_dict(base)
        save_file(train(model, images.tune, seed, 20), folder / f"{seed}.safetensors")
    named = {"source": "timm", "name": "vit_tiny_patch16_224", "kwargs": SMALL}
    record = {
        "model": named,
        "data": {k: v for k, v in digits().items() if k not in ("mean", "std")},
        "images": {"mean": [0.3], "std": [0.38]},
    }
    (folder / "zoo.json").write_text(json.dumps(record))
    found = zoo_config(folder, accuracy={"lost": 0.02})
    built = build(found, tmp_path / "store", progress=False)
    store = Store(tmp_path / "store")
    for name, row in rows(built).items():
        store.export(name, tmp_path / "out.safetensors")
        accuracies = []
        for file in (folder / f"{name}.safetensors", tmp_path / "out.safetensors"):
            model.load_state_dict(load_file(file))
            accuracies.append(evaluate(model, images.select)[0])
        assert [row["accuracy_before"], row["accuracy_after"]] == accuracies
        assert accuracies[0] > 0.6
        assert accuracies[1] >= accuracies[0] - 0.02
        assert store.variants[name].classes == 10
    assert built.table["bytes"].sum() < 0.3 * built.plain_bytes
    assert store.about["model"]["name"] == "vit_tiny_patch16_224"
    assert store.about["data"]["classes"] == [str(digit) for digit in range(10)]
    assert store.about["data"]["mean"] == [0.3]
    assert "accuracy_after" in built.describe()


# --- memory ---

MEASURE = """
import sys
from fleet.storage.building import build
from fleet.storage.config import BuildConfig
from inputs.budget import peak_resident_bytes, resident_bytes
small, large, out, settings = *sys.argv[1:4], eval(sys.argv[4])

def built(zoo, out):
    config = {"base": f"{zoo}/base.safetensors", "variants": zoo, **settings}
    build(BuildConfig.model_validate(config), out, progress=False)

built(small, f"{out}.small")  # what a first build loads of libraries is not the zoo's
before = resident_bytes()
built(large, out)
print(peak_resident_bytes() - before)
"""


def a_zoo(folder, count, **size):
    folder.mkdir()
    base = vit(**size).state_dict()
    save_file(base, folder / "base.safetensors")
    for k in range(count):
        save_file(plus(base, noise(base, k)), folder / f"{k}.safetensors")
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"exact": True}, {"tolerance": 0.65, "domains": 2}])
def test_memory_is_bounded_whatever_the_number_of_variants(tmp_path, settings):
    """A zoo of 260 MiB within 32 MiB, as the bytes that live: freed ones are given back."""
    small = a_zoo(tmp_path / "small", 3)
    large = a_zoo(tmp_path / "large", 23, embed_dim=192, depth=6)
    assert sum(file.stat().st_size for file in Path(large).iterdir()) > 240 << 20
    given = str({**settings, "memory_budget": "32MiB"})
    command = [sys.executable, "-c", MEASURE, small, large, str(tmp_path / "store"), given]
    given_back = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "65536")
    environment = os.environ | given_back
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40 << 20


# --- bad input ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("head.bias"), r"other: .* lacks 1 tensors .*'head.bias'"),
        (
            lambda t: t.update({"norm.bias": t["norm.bias"].double()}),
            r"other: 'norm.bias' is float64 .* float32 in the base; cast",
        ),
    ],
)
def test_a_checkpoint_of_another_base_is_refused_by_name(zoo, tmp_path, change, message):
    tensors = load_file(zoo / "noise.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "other.safetensors")
    paths = {"noise": zoo / "noise.safetensors", "other": tmp_path / "other.safetensors"}
    with pytest.raises(FleetError, match=message):
        build(config(zoo, variants=paths, exact=True), tmp_path / "store", progress=False)
    assert not (tmp_path / "store").exists()


def test_a_budget_that_is_too_small_is_refused_before_anything_is_written(zoo, tmp_path):
    with pytest.raises(FleetError, match=r"memory_budget: 16.0 KiB is too little"):
        build(
            config(zoo, exact=True, domains="none", memory_budget="16KiB"),
            tmp_path / "store",
            progress=False,
        )
    assert not (tmp_path / "store").exists()


def test_data_for_other_classes_is_refused(zoo, tmp_path):
    named = {"source": "timm", "name": "vit_tiny_patch16_224", "kwargs": SMALL}
    save_file(vit(in_chans=1, **SMALL).state_dict(), tmp_path / "base.safetensors")
    save_file(vit(7, in_chans=1, **SMALL).state_dict(), tmp_path / "seven.safetensors")
    given = BuildConfig(
        base=str(tmp_path / "base.safetensors"),
        variants=[tmp_path / "seven.safetensors"],
        accuracy={},
        model=named,
        data=digits(),
    )
    with pytest.raises(FleetError, match=r"seven: its head .* is for 7 classes, select has 10"):
        build(given, tmp_path / "store", progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "found 0 of them"),
        ({"exact": True, "tolerance": 0.1}, "found 2 of them"),
        ({"tolerance": 0}, "greater than 0"),
        ({"tolerance": math.nan}, "finite"),
        ({"accuracy": {"lost": 2}, "exact": False}, "less than or equal to 1"),
        ({"accuracy": {}}, "give `model` and `data` too"),
        ({"exact": True, "domains": 0}, "domains"),
        ({"exact": True, "encodings": ["int3"]}, "int4"),
        ({"exact": True, "leave_out": ["none"]}, "general"),
        ({"exact": True, "tolerence": 0.1}, "did you mean 'tolerance'"),
    ],
)
def test_configs_that_are_refused(zoo, settings, message):
    with pytest.raises(ValidationError, match=message):
        config(zoo, **settings)


def test_variants_are_found_in_a_folder(zoo, tmp_path):
    names = config(zoo, exact=True).paths()
    assert list(names) == sorted(names)
    assert "base" not in names
    assert len(names) == 11
    (tmp_path / "empty").mkdir()
    with pytest.raises(FleetError, match="holds no checkpoint"):
        config(zoo, exact=True, variants=tmp_path / "empty").paths()
    with pytest.raises(FleetError, match="there is no folder"):
        config(zoo, exact=True, variants=tmp_path / "none").paths()
    twice = config(zoo, exact=True, variants=[zoo / "noise.safetensors", tmp_path / "noise.pt"])
    with pytest.raises(FleetError, match="would both be called 'noise'"):
        twice.paths()
    with pytest.raises(FleetError, match="has no base"):
        zoo_config(tmp_path / "empty", exact=True)
    with pytest.raises(FleetError, match="no such folder"):
        zoo_config(tmp_path / "none", exact=True)
    (tmp_path / "zoo.json").write_text("[1]")
    save_file({"a": torch.zeros(2)}, tmp_path / "base.safetensors")
    with pytest.raises(FleetError, match="not the record of a zoo"):
        zoo_config(tmp_path, exact=True)


def test_configs_are_read_without_torch():
    code = "import sys, fleet.storage.config; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_public_names_are_there():
    assert all(hasattr(building, name) for name in building.__all__)
