"""The exception of this package."""


class SoupError(ValueError):
    """Bad input to `soups`: a zoo, a learner or a results folder.

    The message says where, what was found, what was wanted, and the remedy.
    """
