"""The exception of this package."""


class FleetError(ValueError):
    """Bad input to `fleet`: recipes or models to train, store or serve.

    The message says where, what was found, what was wanted, and the remedy.
    """
