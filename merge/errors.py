"""The exception of this package, and all that a user can cause."""

from inputs.errors import InputError


class MergeError(ValueError):
    """Bad input to `merge`: a checkpoint, coefficients or a merge.

    The message says where, what was found, what was wanted, and the remedy.
    """


MISTAKES = (InputError, MergeError)
