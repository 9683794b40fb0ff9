"""The doctor on real files with planted faults: each is found, and nothing that is not there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from merge.errors import MergeError
from merge.registry import METHODS
from soups.__main__ import app
from soups.doctor.advice import Facts, advise
from soups.doctor.diagnosis import Diagnosis, examine
from soups.doctor.geometry import Geometry, families, guess_base, near_copies
from soups.doctor.wording import wording
from soups.errors import SoupError
from soups.learners.registry import LEARNERS
from tests.soups.conftest import FACTORY, make_config

Tensors = dict[str, Tensor]
INGREDIENTS = [f"{k:02d}" for k in range(5)]


@pytest.fixture
def zoo(kitchen, tmp_path) -> Path:
    """A copy of the small zoo, to be spoiled."""
    folder = tmp_path / "zoo"
    shutil.copytree(kitchen / "zoo", folder)
    return folder


def tensors_of(folder: Path, name: str) -> Tensors:
    return load_file(folder / f"{name}.safetensors")


def put(folder: Path, name: str, tensors: Tensors) -> None:
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / f"{name}.safetensors")


def built(seed: int, classes: int = 10, width: int = 12) -> Tensors:
    """The state of the kitchen's network as it is before any training."""
    module: dict[str, Callable] = {}
    exec(FACTORY, module)
    torch.manual_seed(seed)
    return module["build"](classes, width).state_dict()


def permuted(tensors: Tensors) -> Tensors:
    """The same network with the units of its first layer in another order."""
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    moved = dict(tensors)
    moved["0.weight"] = tensors["0.weight"][order]
    for name in ("1.weight", "1.bias", "1.running_mean", "1.running_var"):
        moved[name] = tensors[name][order]
    moved["3.weight"] = tensors["3.weight"][:, order]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    moved["3.weight"] = moved["3.weight"][order]
    for name in ("4.weight", "4.bias", "4.running_mean", "4.running_var"):
        moved[name] = tensors[name][order]
    moved["9.weight"] = tensors["9.weight"].reshape(10, 12, 4)[:, order].reshape(10, 48)
    return moved


def found(diagnosis: Diagnosis) -> dict[str, tuple[str, ...]]:
    """Kind → members of what is wrong or odd."""
    return {f.kind: f.members for f in diagnosis.findings if f.level != "note"}


def text_of(diagnosis: Diagnosis, kind: str) -> str:
    return next(f"{f.text}; {f.remedy}" for f in diagnosis.findings if f.kind == kind)


def test_a_healthy_zoo(zoo):
    diagnosis = examine(zoo)
    assert found(diagnosis) == {}
    assert (diagnosis.base, diagnosis.sure) == ("base", "sure")
    assert [patient.name for patient in diagnosis.patients] == [*INGREDIENTS, "base"]
    assert "fewest steps" in text_of(diagnosis, "base")
    assert "recalibrate" in text_of(diagnosis, "statistics")
    text = wording(diagnosis)
    assert "Nothing is wrong or odd." in text
    assert max(map(len, text.splitlines()[1:])) <= 100


def spoil_duplicate(zoo: Path) -> None:
    put(zoo, "again", tensors_of(zoo, "02"))


def spoil_nan(zoo: Path) -> None:
    tensors = tensors_of(zoo, "03")
    tensors["3.weight"][0, 0, 0, 0] = torch.nan
    tensors["9.bias"][1] = torch.inf
    put(zoo, "03", tensors)


def spoil_other_base(zoo: Path) -> None:
    put(zoo, "stranger", built(7))


def spoil_permuted(zoo: Path) -> None:
    put(zoo, "shuffled", permuted(tensors_of(zoo, "01")))


def spoil_head(zoo: Path) -> None:
    own = tensors_of(zoo, "01")
    put(zoo, "sevens", own | {n: t for n, t in built(0, classes=7).items() if n.startswith("9.")})


def spoil_architecture(zoo: Path) -> None:
    put(zoo, "narrow", built(0, width=5))


def spoil_tensors(zoo: Path) -> None:
    own = tensors_of(zoo, "01")
    del own["1.bias"]
    put(zoo, "01", own)


def spoil_dtype(zoo: Path) -> None:
    own = tensors_of(zoo, "04")
    put(zoo, "04", {n: t.half() if t.is_floating_point() else t for n, t in own.items()})


def spoil_near(zoo: Path) -> None:
    own = tensors_of(zoo, "02")
    put(zoo, "nearly", own | {"9.bias": own["9.bias"] + 1e-4})


def spoil_length(zoo: Path) -> None:
    own, base = tensors_of(zoo, "02"), tensors_of(zoo, "base")
    floats = {n for n, t in own.items() if t.is_floating_point() and "running" not in n}
    put(zoo, "02", own | {n: base[n] + 15 * (own[n] - base[n]) for n in floats})


def spoil_file(zoo: Path) -> None:
    (zoo / "broken.safetensors").write_bytes(b"no checkpoint")


FAULTS = {
    "duplicate": (spoil_duplicate, ("02", "again"), "bit for bit"),
    "nonfinite": (spoil_nan, ("03",), r"2 values in 3.weight, 9.bias are NaN or infinite"),
    "stranger": (spoil_other_base, ("stranger",), "not fine-tuned from the base of the others"),
    "permuted": (spoil_permuted, ("shuffled",), "units in another order.*align:"),
    "head": (spoil_head, ("sevens",), r"\[7, 48\], \[10, 48\] elsewhere.*skip: \['9\.\*'\]"),
    "architecture": (spoil_architecture, ("narrow",), "another architecture"),
    "tensors": (spoil_tensors, ("01",), r"lacks 1 tensor \(1.bias\)"),
    "dtype": (spoil_dtype, ("04",), "in float16, the others in float32"),
    "near duplicate": (spoil_near, ("02", "nearly"), "nearly the same"),
    "length": (spoil_length, ("02",), "times as far from base"),
    "unreadable": (spoil_file, ("broken",), "cannot be opened"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_planted_fault_is_found_and_nothing_else(kind, zoo):
    spoil, members, said = FAULTS[kind]
    spoil(zoo)
    diagnosis = examine(zoo)
    assert found(diagnosis) == {kind: members}
    assert all(member in wording(diagnosis) for member in members)
    assert re.search(said, text_of(diagnosis, kind))
    assert diagnosis.base == "base"
    assert diagnosis.sure == "sure"


def test_many_faults_at_once(zoo):
    for kind in ("duplicate", "nonfinite", "stranger", "head", "architecture", "unreadable"):
        FAULTS[kind][0](zoo)
    diagnosis = examine(zoo)
    assert found(diagnosis) == {
        kind: FAULTS[kind][1]
        for kind in ("duplicate", "nonfinite", "stranger", "head", "architecture", "unreadable")
    }
    assert diagnosis.base == "base"
    assert "10 checkpoints, and 1 that cannot be opened; most" in wording(diagnosis)
    levels = [finding.level for finding in diagnosis.findings]
    assert levels == sorted(levels, key=["wrong", "odd", "note"].index)


def test_a_renamed_base_is_found_by_the_steps_it_has_counted(zoo):
    (zoo / "base.safetensors").rename(zoo / "x7.safetensors")
    diagnosis = examine(zoo)
    assert (diagnosis.base, diagnosis.sure) == ("x7", "sure")
    assert "rename it to base.*" in text_of(diagnosis, "base")
    assert found(diagnosis) == {}


def test_another_network_that_is_called_base(zoo):
    (zoo / "base.safetensors").rename(zoo / "x7.safetensors")
    put(zoo, "base", built(7))
    diagnosis = examine(zoo)
    assert found(diagnosis) == {"stranger": ("base",), "base": ("base",)}
    assert diagnosis.base == "x7"


def test_a_base_that_was_named(zoo):
    diagnosis = examine(zoo, base="00")
    assert (diagnosis.base, diagnosis.sure) == ("00", "sure")
    with pytest.raises(SoupError, match=r"there is no 'basis'.*00, 01"):
        examine(zoo, base="basis")


def test_a_base_that_was_named_is_the_copy_to_keep(zoo):
    put(zoo, "copy", tensors_of(zoo, "base"))
    diagnosis = examine(zoo, base="copy")
    assert found(diagnosis) == {"duplicate": ("copy", "base")}
    assert (diagnosis.base, diagnosis.sure) == ("copy", "sure")


def test_a_base_that_was_named_and_is_broken(zoo):
    put(zoo, "00", {name: t * float("nan") for name, t in tensors_of(zoo, "00").items()})
    diagnosis = examine(zoo, base="00")
    assert found(diagnosis)["base"] == ("00",)
    assert diagnosis.base is None


@pytest.mark.parametrize("times", [1e6, 1e9, 1e12])
def test_a_checkpoint_that_has_diverged(tmp_path, times):
    """Beside it rounding leaves nothing of the others: it is told all the same."""
    stream = torch.Generator().manual_seed(0)
    base = torch.randn(8, 8, generator=stream)
    for name in ("base", "00", "01", "02"):
        moved = base + 0.1 * torch.randn(8, 8, generator=stream) * (name != "base")
        put(tmp_path, name, {"weight": moved * (times if name == "02" else 1)})
    diagnosis = examine(tmp_path)
    assert any("02" in finding.members for finding in diagnosis.findings)
    wording(diagnosis)


def test_checkpoints_without_a_number_that_can_be_mixed(tmp_path):
    for k in range(3):
        put(tmp_path, f"{k}", {"codes": torch.arange(4) + k})
    assert found(examine(tmp_path)) == {"few": ("0", "1", "2")}


def test_an_untrained_copy_of_the_base(zoo):
    put(zoo, "00", tensors_of(zoo, "base"))
    diagnosis = examine(zoo)
    assert found(diagnosis) == {"duplicate": ("base", "00")}
    assert "never trained" in text_of(diagnosis, "duplicate")
    assert diagnosis.base == "base"


@pytest.mark.parametrize("kept", [["00"], ["base", "00"], ["00", "01"]])
def test_few_checkpoints(zoo, kept):
    for file in zoo.glob("*.safetensors"):
        if file.stem not in kept:
            file.unlink()
    diagnosis = examine(zoo)
    assert ("few" in found(diagnosis)) == (len(kept) == 1)
    assert [patient.name for patient in diagnosis.patients] == sorted(kept)
    wording(diagnosis)


def test_frozen_tensors_are_noted(zoo):
    base = tensors_of(zoo, "base")
    for name in INGREDIENTS:
        put(zoo, name, tensors_of(zoo, name) | {"0.weight": base["0.weight"]})
    assert "0.weight" in text_of(examine(zoo), "frozen")


def test_the_base_shares_what_each_fine_tune_left_unchanged(zoo):
    """Without a name and without counters: each froze something else."""
    base = tensors_of(zoo, "base")
    (zoo / "base.safetensors").unlink()
    names = ["0.weight", "1.weight", "3.weight", "4.weight", "9.weight"]
    for name, frozen in zip(INGREDIENTS, names, strict=True):
        own = tensors_of(zoo, name) | {frozen: base[frozen]}
        put(zoo, name, {n: t for n, t in own.items() if "num_batches" not in n})
    put(zoo, "x7", {n: t for n, t in base.items() if "num_batches" not in n})
    diagnosis = examine(zoo)
    assert diagnosis.base == "x7"
    assert diagnosis.sure == "likely"
    assert "shares unchanged tensors" in text_of(diagnosis, "base")


# --- with a model and images ---------------------------------------------------------------------


def test_basins_are_measured_with_a_config(kitchen, zoo):
    put(zoo, "stranger", built(7))
    config = make_config(kitchen)
    diagnosis = examine(zoo, config=config, root=kitchen, images=128)
    basins = diagnosis.basins
    assert basins is not None
    assert basins.images == 128
    assert basins.groups == (tuple(INGREDIENTS), ("stranger",))
    assert len(basins.barriers) == 15
    crossed = {frozenset((b.first, b.second)) for b in basins.barriers if b.stands}
    assert all("stranger" in pair for pair in crossed)
    assert basins.accuracies["00"] > 0.7 > 0.3 > basins.accuracies["stranger"]
    assert found(diagnosis) == {"stranger": ("stranger",), "barrier": ("stranger",)}
    record = json.loads(json.dumps(diagnosis.record(), allow_nan=False))
    assert {b["stands"] for b in record["basins"]["barriers"]} == {True, False}
    text = wording(diagnosis)
    assert "accuracy %" in text
    # Advice is for those that can be mixed, which share a basin.
    assert "What would probably work, without what is wrong:" in text
    assert "- would work: uniform." in text


def test_a_healthy_zoo_shares_a_basin(kitchen, zoo):
    diagnosis = examine(zoo, config=make_config(kitchen), root=kitchen, images=128)
    assert found(diagnosis) == {}
    assert "all share a basin" in text_of(diagnosis, "basin")
    assert diagnosis.basins is not None
    assert len(diagnosis.basins.groups) == 1


# --- geometry ------------------------------------------------------------------------------------


def geometry_of(points: np.ndarray) -> Geometry:
    centred = points - points.mean(axis=0)
    norms = np.linalg.norm(points, axis=1)
    return Geometry(centred @ centred.T, points @ points.T / np.outer(norms, norms))


def star(count: int, seed: int = 0, drift: float = 0.0) -> np.ndarray:
    """A base at the end, and fine-tunes of lengths from 1 to 2 in random directions, and one."""
    rng = np.random.default_rng(seed)
    base = 5 * rng.normal(size=400) / 20
    deltas = rng.normal(size=(count, 400)) / 20 * np.linspace(1, 2, count)[:, None]
    deltas += drift * rng.normal(size=400) / 20
    return np.vstack([base + deltas, base])


def guess(points: np.ndarray):
    count = len(points)
    return guess_base(
        geometry_of(points),
        [f"{k}" for k in range(count)],
        [None] * count,
        np.zeros((count, count), dtype=np.int64),
    )


@pytest.mark.parametrize("seed", range(5))
def test_geometry_finds_the_base_of_independent_fine_tunes(seed):
    answer = guess(star(8, seed))
    assert answer is not None
    assert answer.place == 8
    assert answer.sure == "likely"
    assert abs(answer.mean_cosine) < 0.1
    assert answer.rivals == ()


@pytest.mark.parametrize("seed", range(5))
def test_without_a_base_geometry_is_not_sure(seed):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=400) + rng.normal(size=(8, 400)) / 4
    answer = guess(points)
    assert answer is not None
    assert answer.sure == "perhaps"
    assert len(answer.rivals) >= 5


def test_what_is_far_from_all_is_a_family_of_its_own():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 300))
    points = np.vstack([b, *(a + rng.normal(size=300) / 3 for _ in range(3)), b * 1.01])
    assert families(geometry_of(points)).tolist() == [1, 0, 0, 0, 1]


def test_the_own_part_is_the_distance_to_the_others_span():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(4, 30))
    others = points[1:] - points[1]
    rest = points[0] - points[1]
    q, _ = np.linalg.qr(others[1:].T)
    expected = np.linalg.norm(rest - q @ (q.T @ rest)) ** 2
    assert geometry_of(points).own_part(0, [1, 2, 3]) == pytest.approx(expected, rel=1e-5)


def test_near_copies_are_far_nearer_than_most():
    points = star(6)
    points[2] = points[1] + 0.01 * (points[2] - points[1])
    assert near_copies(geometry_of(points)) == [(1, 2)]


def test_weights_are_compared_as_they_are_within_any_budget(zoo):
    """Against plain arithmetic on whole tensors, and in the smallest slices."""
    names = [*INGREDIENTS, "base"]
    whole = [tensors_of(zoo, name) for name in names]
    kept = [n for n, t in whole[0].items() if t.is_floating_point() and "running" not in n]
    flat = np.array([torch.cat([own[n].flatten() for n in kept]).double().numpy() for own in whole])
    apart = np.linalg.norm(flat - flat[-1], axis=1)
    diagnosis = examine(zoo, memory_budget=1 << 20)
    distances = [patient.distance for patient in diagnosis.patients]
    assert distances == pytest.approx(apart.tolist(), rel=1e-5, abs=1e-6)
    with pytest.raises(MergeError, match="memory_budget"):
        examine(zoo, memory_budget=1 << 14)


# --- advice --------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [None, "base"])
@pytest.mark.parametrize("count", [2, 3, 16])
@pytest.mark.parametrize("cosine", [None, 0.05, 0.2, 0.8])
def test_every_learner_and_method_is_spoken_of_once(base, count, cosine):
    said = advise(Facts(count, base, nbytes=1000, cosine=cosine))
    for of, known in (("learner", LEARNERS), ("method", METHODS)):
        names = [name for advice in said if advice.of == of for name in advice.names]
        assert sorted(names) == sorted(known)
    verdicts = {name: advice.verdict for advice in said for name in advice.names}
    assert (verdicts["wise_ft"] == "would work") == (base is not None)
    assert (verdicts["ties"] == "not as it is") == (base is None)
    assert verdicts["linear"] == "would work"
    assert (verdicts["nuslerp"] == "not as it is") == (count != 2)


def test_across_a_barrier_a_mean_is_advised_against():
    said = advise(Facts(4, "base", 1000, connected=False))
    verdicts = {name: advice.verdict for advice in said for name in advice.names}
    assert verdicts["uniform"] == verdicts["linear"] == "not as it is"
    assert verdicts["greedy"] == "would work"
    assert next(advice.why for advice in said if "linear" in advice.names).count("basin") == 2
    assert advise(Facts(1, "base", 1000)) == []


# --- the command ---------------------------------------------------------------------------------


def test_the_command_prints_a_text_or_json(zoo):
    runner = CliRunner()
    text = runner.invoke(app, ["doctor", str(zoo), "--quiet"])
    assert text.exit_code == 0, text.output
    assert text.output == wording(examine(zoo)) + "\n"
    machine = runner.invoke(app, ["doctor", str(zoo), "--json"])
    assert json.loads(machine.stdout) == json.loads(json.dumps(examine(zoo).record()))


def test_the_command_says_what_is_wrong_with_its_words(kitchen, zoo, tmp_path):
    runner = CliRunner()
    for words, said in (
        ([str(tmp_path / "none")], "is no folder"),
        ([str(tmp_path)], "found no checkpoint"),
        ([str(zoo), "seed=1"], "give --config"),
        ([str(zoo), "--memory-budget", "much"], "is no size"),
        ([str(zoo), "--config", str(zoo / "no.yaml")], "no.yaml"),
    ):
        done = runner.invoke(app, ["doctor", *words])
        assert done.exit_code == 2, words
        assert said in " ".join(done.output.split())


def test_help_comes_without_torch():
    code = (
        "import sys; import soups.__main__\n"
        "assert not {'torch', 'matplotlib', 'pandas'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
