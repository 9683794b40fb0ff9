"""All that the doctor finds in a folder of checkpoints, and how it says so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from merge.checkpoints import Scan
from merge.scans import scan_all
from soups.config import LearnConfig
from soups.doctor.advice import Advice, Facts, advise
from soups.doctor.basins import Basins, find_basins, open_session
from soups.doctor.finding import Finding, listed, plural
from soups.doctor.folder import (
    BASE,
    Folder,
    check_contents,
    duplicates_of,
    open_folder,
    trained_steps,
)
from soups.doctor.geometry import (
    BaseGuess,
    Geometry,
    families,
    guess_base,
    measure,
    near_copies,
    odd_lengths,
)
from soups.doctor.permuted import looks_permuted
from soups.errors import SoupError


@dataclass(frozen=True)
class Patient:
    """One checkpoint in the doctor's table.

    `distance` is that of its shared weights to the base, else to the mean of all; `cosine` the
    mean cosine of its delta with the others'; `nearest` the checkpoint that is nearest to it.
    """

    name: str
    distance: float | None = None
    cosine: float | None = None
    nearest: str | None = None
    accuracy: float | None = None


@dataclass
class Diagnosis:
    """What is wrong or odd with a folder of checkpoints, and what would probably work on it.

    `base` is its name, where there is a guess, with how `sure` it is.
    """

    folder: str
    patients: list[Patient]
    tensors: int
    parameters: int
    findings: list[Finding] = field(default_factory=list)
    base: str | None = None
    sure: str | None = None
    basins: Basins | None = None
    advice: list[Advice] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """All of it as JSON can hold it; what is not known is null."""
        record = asdict(self)
        for patient in record["patients"]:
            for key, value in patient.items():
                if isinstance(value, float) and not math.isfinite(value):
                    patient[key] = None
        if self.basins is not None:
            stand = [barrier.stands for barrier in self.basins.barriers]
            for barrier, stands in zip(record["basins"]["barriers"], stand, strict=True):
                barrier["stands"] = stands
        return record


def examine(
    path: Path,
    *,
    base: str | None = None,
    config: LearnConfig | None = None,
    root: Path = Path(),
    images: int = 512,
    memory_budget: int = 512 << 20,
    progress: bool = False,
) -> Diagnosis:
    """Look at every checkpoint of a folder: headers, then hashes, then weights, in slices.

    `base` names the base where it is known. With a `config` the loss between the checkpoints is
    measured on `images` images of its *select*. Raises SoupError where there is nothing to look
    at, and MergeError where the budget is too small to look.
    """
    with ExitStack() as opened:
        folder = open_folder(path, opened, memory_budget=memory_budget)
        if base is not None and base not in folder.names:
            raise SoupError(f"--base: there is no {base!r} in {path}; found {listed(folder.names)}")
        scans = scan_all(folder.checkpoints, progress=progress)
        check_contents(folder, scans, base or BASE)
        return _Examination(folder, scans, base, memory_budget, progress).run(config, root, images)


class _Examination:
    """The work of `examine` on an opened folder, one question after the other."""

    def __init__(
        self,
        folder: Folder,
        scans: Sequence[Scan],
        base: str | None,
        memory_budget: int,
        progress: bool,
    ) -> None:
        self.folder, self.scans, self.named_base = folder, scans, base
        self.memory_budget, self.progress = memory_budget, progress
        copies = duplicates_of(folder)
        # Which of the folder's checkpoints are set against each other, and which of those are kin.
        self.kept = [
            k for k in folder.compared if folder.names[k] not in copies and not scans[k].nonfinite
        ]
        self.family = list(range(len(self.kept)))
        self.geometry: Geometry | None = None
        self.guess: BaseGuess | None = None
        self.basins: Basins | None = None

    def name(self, place: int) -> str:
        """What the checkpoint at this place among those that are compared is called."""
        return self.folder.names[self.kept[place]]

    def run(self, config: LearnConfig | None, root: Path, images: int) -> Diagnosis:
        tensors: list[str] = []
        if len(self.kept) > 1:
            self.folder.compared = self.kept
            tensors = self.folder.shared_weights()
        if tensors:
            checkpoints = [self.folder.checkpoints[k] for k in self.kept]
            names = [self.name(place) for place in self.family]
            self.geometry = measure(
                checkpoints,
                names,
                tensors,
                memory_budget=self.memory_budget,
                progress=self.progress,
            )
            self._find_strangers(tensors)
            self._find_near_copies()
            self._find_base()
            self._find_odd_lengths()
        self._note(tensors)
        members = self._measurable()
        if config is not None and len(members) > 1:
            self._find_basins(members, config, root, images)
        return self._diagnosis()

    # --- questions -------------------------------------------------------------------------------

    def _find_strangers(self, tensors: Sequence[str]) -> None:
        assert self.geometry is not None
        numbers = families(self.geometry)
        self.family = np.flatnonzero(numbers == 0).tolist()
        kin = [self.folder.checkpoints[self.kept[k]] for k in self.family[:2]]
        for number in range(1, int(numbers.max()) + 1):
            members = np.flatnonzero(numbers == number).tolist()
            names = [self.name(k) for k in members]
            stranger = self.folder.checkpoints[self.kept[members[0]]]
            likeness = float(self.geometry.likeness[np.ix_(members, self.family)].mean())
            far = f"the cosine of their weights is {likeness:.2f}"
            if len(kin) > 1 and looks_permuted(stranger, kin, tensors):
                text = f"the same network with its units in another order ({far})"
                remedy = "give the merge `align:`, which brings units in order, or take it out"
                self.folder.find("permuted", "wrong", names, text, remedy)
            else:
                verb = "were" if len(names) > 1 else "was"
                text = f"{verb} not fine-tuned from the base of the others ({far})"
                remedy = (
                    "take it out, or make a zoo of its own of it; of networks that were trained "
                    "apart, `align:` in a merge may help"
                )
                self.folder.find("stranger", "wrong", names, text, remedy)

    def _find_near_copies(self) -> None:
        assert self.geometry is not None
        for a, b in near_copies(self.geometry):
            if a in self.family and b in self.family:
                apart = self.geometry.distances[a, b]
                self.folder.find(
                    "near duplicate",
                    "odd",
                    [self.name(a), self.name(b)],
                    f"are nearly the same ({apart:.3g} apart): neighbouring epochs of a run, or "
                    "one saved twice",
                    "keep one if so: together they weigh double",
                )

    def _find_base(self) -> None:
        assert self.geometry is not None
        names = [self.name(k) for k in self.family]
        if self.named_base is not None:
            if self.named_base in names:
                self.guess = BaseGuess(
                    names.index(self.named_base), "sure", ("you say so",), float("nan")
                )
            else:
                text = "is named as the base, but cannot be set against the others"
                self.folder.find("base", "wrong", [self.named_base], text, "name another")
            return
        part = np.ix_(self.family, self.family)
        geometry = Geometry(self.geometry.gram[part], self.geometry.likeness[part])
        steps = [trained_steps(self.folder.checkpoints[self.kept[k]]) for k in self.family]
        self.guess = guess_base(geometry, names, steps, self._shared_tensors())
        for place in set(range(len(self.kept))) - set(self.family):
            if self.name(place) == BASE:
                self.folder.find(
                    "base",
                    "odd",
                    [BASE],
                    "is called base, but the others were not fine-tuned from it",
                    "give it another name, or name the right one with --base and zoo.base",
                )
        if self.guess is None:
            return
        name, guess = names[self.guess.place], self.guess
        rivals = [names[k] for k in guess.rivals]
        text = f"is {_SURE[guess.sure]} the base: {'; '.join(guess.reasons)}"
        if np.isfinite(guess.mean_cosine):
            text += (
                f"; the deltas of the others to it have a mean cosine of {guess.mean_cosine:.2f}"
            )
        if rivals:
            text += f"; {listed(rivals)} could be it as well"
        remedy = "" if name == BASE else "if so, rename it to base.*, or name it in zoo.base"
        self.folder.find("base", "note", [name], text, remedy)

    def _find_odd_lengths(self) -> None:
        lengths, origin = self._lengths()
        members = [k for k in self.family if k != self._base_place()]
        if len(members) < 3:
            return
        odd = odd_lengths(np.array([lengths[k] for k in members]))
        usual = float(np.median([lengths[k] for k in members]))
        for k, is_odd in zip(members, odd, strict=True):
            if is_odd:
                times = lengths[k] / usual
                far = f"{times:.2g} times as far" if times > 1 else f"only {times:.2g} as far"
                self.folder.find(
                    "length",
                    "odd",
                    [self.name(k)],
                    f"went {far} from {origin} as most do: another learning rate, length of "
                    "training, or task",
                    "look at its accuracy; in a uniform soup it counts for much or for nothing",
                )

    def _note(self, tensors: Sequence[str]) -> None:
        """What is neither wrong nor odd; and if there is nothing to mix."""
        if len(self._ingredients()) < 2:
            text = f"there is nothing to mix: {plural(len(self._ingredients()), 'checkpoint')} left"
            self.folder.find("few", "wrong", [], text, "a soup needs two of one base, or more")
        if len(self.kept) > 1 and not tensors:
            text = "share no weights that can be compared: no tensor of floating-point numbers"
            names = [self.folder.names[k] for k in self.kept]
            self.folder.find("few", "wrong", names, text, "a soup is a mean of such numbers")
        elif len(self.kept) > 1:
            digests = [self.scans[k].digests for k in self.kept]
            frozen = [n for n in tensors if len({own[n] for own in digests}) == 1]
            if frozen:
                text = f"{plural(len(frozen), 'tensor')} of weights are the same in all: frozen"
                self.folder.find("frozen", "note", [], f"{text} ({listed(frozen, 3)})")
        if self.folder.has_statistics:
            self.folder.find(
                "statistics",
                "note",
                [],
                "there are norm layers with running statistics, which a mean of weights does not "
                "fit",
                "say how with norm_buffers; `recalibrate` estimates them again for each soup",
            )

    def _find_basins(
        self, members: Sequence[int], config: LearnConfig, root: Path, images: int
    ) -> None:
        names = [self.name(k) for k in members]
        base = self._base_place()
        files = [Path(self.folder.paths[self.kept[k]]).name for k in members]
        lengths, _ = self._lengths()
        centre = int(np.argmin([lengths.get(k, np.inf) for k in members]))
        with open_session(
            config,
            self.folder.path,
            files,
            None if base is None else self.folder.paths[self.kept[base]],
            root=root,
            progress=self.progress,
        ) as session:
            self.basins = find_basins(session, names, centre, images=images)
        apart = [barrier for barrier in self.basins.barriers if barrier.stands]
        groups = self.basins.groups
        if len(groups) > 1:
            others = len(groups[0]) - 1
            largest = groups[0][0] + (f" and {plural(others, 'other')}" if others else "")
            for group in groups[1:]:
                self.folder.find(
                    "barrier",
                    "odd",
                    group,
                    f"{'do' if len(group) > 1 else 'does'} not share a basin with {largest}: the "
                    "loss half-way is higher",
                    "mix the checkpoints of one basin; with norm layers try norm_buffers: "
                    "recalibrate first",
                )
        elif apart:
            worst = max(apart, key=lambda barrier: barrier.loss)
            self.folder.find(
                "barrier",
                "note",
                [worst.first, worst.second],
                f"have a barrier of {worst.loss:.2g} nats between them, the highest of "
                f"{plural(len(apart), 'pair')} with one; by way of others they are connected",
            )
        else:
            self.folder.find(
                "basin",
                "note",
                [],
                f"all share a basin: between no two of {len(names)} is there a barrier, on "
                f"{self.basins.images:,} images of select",
            )

    # --- answers ---------------------------------------------------------------------------------

    def _base_place(self) -> int | None:
        """The base among those that are compared, where it is at least likely."""
        if self.guess is None or self.guess.sure == "perhaps":
            return None
        return self.family[self.guess.place]

    def _ingredients(self) -> list[int]:
        """The kin without their base: what a soup can be made of."""
        return [k for k in self.family if k != self._base_place()]

    def _measurable(self) -> list[int]:
        """What a model can be given: the strangers too, but not what has other tensors."""
        other = {
            n for f in self.folder.findings if f.kind in ("head", "tensors") for n in f.members
        }
        places = range(len(self.kept))
        return [k for k in places if k != self._base_place() and self.name(k) not in other]

    def _lengths(self) -> tuple[dict[int, float], str]:
        """How far each of the kin is from the base, else from their mean; and which that is."""
        assert self.geometry is not None
        place = self._base_place()
        if place is not None:
            return {k: self.geometry.distances[place, k] for k in self.family}, self.name(place)
        part = self.geometry.gram[np.ix_(self.family, self.family)]
        to_mean = np.diagonal(part) - 2 * part.mean(axis=1) + part.mean()
        lengths = np.sqrt(np.maximum(to_mean, 0.0))
        return dict(zip(self.family, lengths.tolist(), strict=True)), "the mean"

    def _shared_tensors(self) -> Int64[np.ndarray, "models models"]:
        """How many tensors of weights are the same in each two of the kin."""
        digests = [[*self.scans[self.kept[k]].digests.items()] for k in self.family]
        counts = [[len({*a} & {*b}) for b in digests] for a in digests]
        return np.array(counts, dtype=np.int64)

    def _share_a_basin(self, members: Sequence[int]) -> bool | None:
        """Whether those of them do that were measured; None where nothing was."""
        if self.basins is None:
            return None
        names = {self.name(k) for k in members} & self.basins.accuracies.keys()
        return any(names <= {*group} for group in self.basins.groups)

    def _cosines(self) -> dict[int, float]:
        """The mean cosine of each delta to the base with the others'."""
        place, members = self._base_place(), self._ingredients()
        if self.geometry is None or place is None or len(members) < 2:
            return {}
        cosines = self.geometry.cosines(place, members)
        np.fill_diagonal(cosines, np.nan)
        with np.errstate(invalid="ignore"):
            means = [
                float(np.nanmean(row)) if np.isfinite(row).any() else math.nan for row in cosines
            ]
        return dict(zip(members, means, strict=True))

    def _diagnosis(self) -> Diagnosis:
        cosines = self._cosines()
        patients = {name: Patient(name) for name in self.folder.names}
        if self.geometry is not None:
            lengths, _ = self._lengths()
            distances = self.geometry.distances + np.diag(np.full(len(self.kept), np.inf))
            for k in range(len(self.kept)):
                name = self.name(k)
                patients[name] = Patient(
                    name,
                    distance=lengths.get(k),
                    cosine=cosines.get(k),
                    nearest=self.name(int(np.argmin(distances[k]))),
                    accuracy=self.basins.accuracies.get(name) if self.basins else None,
                )
        first = self.folder.checkpoints[(self.kept or [0])[0]]
        ingredients = self._ingredients()
        sizes = [sum(t.nbytes for t in first.tensors.values())]
        base = None if self.guess is None else self.name(self.family[self.guess.place])
        facts = Facts(
            ingredients=len(ingredients),
            base=base if self._base_place() is not None else None,
            nbytes=max(sizes),
            cosine=float(np.nanmean([*cosines.values()])) if cosines else None,
            connected=self._share_a_basin(ingredients),
        )
        order = {"wrong": 0, "odd": 1, "note": 2}
        return Diagnosis(
            folder=str(self.folder.path),
            patients=[*patients.values()],
            tensors=len(first.tensors),
            parameters=sum(t.numel for t in first.tensors.values()),
            findings=sorted(self.folder.findings, key=lambda found: order[found.level]),
            base=base,
            sure=None if self.guess is None else self.guess.sure,
            basins=self.basins,
            advice=advise(facts) if self.geometry is not None else [],
        )


_SURE = {"sure": "surely", "likely": "probably", "perhaps": "perhaps"}
