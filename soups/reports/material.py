"""What a report is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float64

from inputs.data import ImageSet
from merge.coefficients import Coefficients
from soups.reports.geometry import Grams, weight_grams
from soups.reports.points import point_columns
from soups.session import Session


@dataclass
class Material:
    """The session, which never reaches *report*, and the learners' soups by row."""

    session: Session
    soups: Mapping[str, Coefficients]

    @cached_property
    def grams(self) -> Grams:
        """Inner products of the ingredients, computed once for all reports that ask."""
        return weight_grams(self.session)

    def point(self, name: str) -> Float64[np.ndarray, "ingredients tensors"]:
        """The coefficients of a learner's soup, an ingredient or the base, tensor by tensor."""
        return point_columns(name, self.session, self.soups)

    @property
    def remark(self) -> str:
        """What the scores are of."""
        session = self.session
        buffers = f"; norm buffers: {session.norms.rule}" if session.norms.names else ""
        return f"{len(session.select):,} images of select{buffers}"

    def judged_remark(self, images: ImageSet) -> str:
        """What the scores are of where these images of *report* judge what *select* chose."""
        return f"{len(images):,} images of report; chosen on {self.remark}"
