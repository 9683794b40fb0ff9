"""The exception of this package."""


class MergeError(ValueError):
    """Bad input to `merge`: a checkpoint, coefficients or a merge.

    The message says where, what was found, what was wanted, and the remedy.
    """
