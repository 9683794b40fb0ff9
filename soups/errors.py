"""The exception of this package, and all that a user can cause."""

from fleet.errors import FleetError
from inputs.errors import InputError
from kernels.errors import KernelError
from merge.errors import MergeError


class SoupError(ValueError):
    """Bad input to `soups`: a zoo, a learner or a results folder.

    The message says where, what was found, what was wanted, and the remedy.
    """


MISTAKES = (InputError, MergeError, FleetError, KernelError, SoupError)
