"""Populations of candidates, scored in whole passes that a killed run does not repeat."""

from __future__ import annotations

import hashlib
import io
import logging
from time import perf_counter

import numpy as np
import torch
from jaxtyping import Float64

from inputs.data import ImageSet
from inputs.files import write_whole
from inputs.randomness import generator
from soups.learners.metrics import Summary
from soups.norms import Groups
from soups.session import Session

FILE = "scores.npz"
DIGEST_BYTES = 32

log = logging.getLogger(__name__)


class ScoreLog:
    """Scores of candidates as a few numbers each, with a memory in the row's folder.

    A search is a function of its seed and of the scores that it is given. So its state is the
    scores so far: a run that goes on proposes the same candidates again and is told their scores
    from the file, until it comes to a pass that was not finished. A pass is known by its place and
    by a hash of its candidates and images. Without a folder there is no file.
    """

    def __init__(self, session: Session, groups: Groups, summary: Summary) -> None:
        self._session, self._groups, self._summary = session, groups, summary
        self._path = session.folder / FILE if session.folder is not None else None
        self._digests, self._values, self._seconds = self._read()
        self._done = 0
        self.candidates = 0

    def __call__(
        self,
        candidates: Float64[np.ndarray, "candidates ingredients groups"],
        images: ImageSet | None = None,
    ) -> Float64[np.ndarray, "candidates values"]:
        """The summary of each candidate's scores on `images`, by default all of *select*."""
        images = images or self._session.select
        digest = _digest(candidates, images)
        self.candidates += len(candidates)
        if self._done < len(self._digests) and self._digests[self._done] == digest:
            self._session.skip(candidates, self._groups, images, self._seconds[self._done])
        else:
            self._forget_the_rest()
            start = perf_counter()
            scores = self._session.evaluate(candidates, self._groups, images)
            self._seconds.append(perf_counter() - start)
            self._digests.append(digest)
            self._values.append(self._summary(scores, images))
            self._write()
        self._done += 1
        return self._values[self._done - 1].copy()

    def _forget_the_rest(self) -> None:
        if self._done < len(self._digests):
            log.warning(
                "%s: from pass %d on, %s is of other candidates; they are scored again",
                self._session.row,
                self._done + 1,
                self._path,
            )
            for known in (self._digests, self._values, self._seconds):
                del known[self._done :]

    def _read(self) -> tuple[list[bytes], list[np.ndarray], list[float]]:
        if self._path is None or not self._path.exists():
            return [], [], []
        with np.load(self._path, allow_pickle=False) as state:
            ends = np.cumsum(state["counts"])[:-1]
            values = np.split(state["values"], ends)
            digests = [row.tobytes() for row in state["digests"]]
            return digests, values, state["seconds"].tolist()

    def _write(self) -> None:
        if self._path is None:
            return
        file = io.BytesIO()
        digests = np.frombuffer(b"".join(self._digests), np.uint8).reshape(-1, DIGEST_BYTES)
        counts = [len(values) for values in self._values]
        values = np.concatenate(self._values)
        np.savez(file, digests=digests, counts=counts, values=values, seconds=self._seconds)
        write_whole(self._path, file.getvalue())


def _digest(candidates: np.ndarray, images: ImageSet) -> bytes:
    labels = images.labels.numpy().tobytes()
    return hashlib.sha256(np.ascontiguousarray(candidates).tobytes() + labels).digest()


def some_of_select(session: Session, count: int | None, name: str) -> ImageSet:
    """`count` images of *select* drawn by a stream of this name; all where there are no more."""
    rows = len(session.select)
    if count is None or count >= rows:
        return session.select
    order = torch.randperm(rows, generator=generator(session.seed, f"{session.row}/{name}"))
    return session.select.subset(order[:count].sort().values)


def numpy_generator(session: Session, name: str) -> np.random.Generator:
    """The row's own stream of this name."""
    return np.random.default_rng(generator(session.seed, f"{session.row}/{name}").initial_seed())
