"""The exception of this package."""


class InputError(ValueError):
    """Bad input to `inputs`: a config, a model, an image set or a budget.

    The message says where, what was found, what was wanted, and the remedy.
    """
