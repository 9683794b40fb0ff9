"""The package's exception."""


class KernelError(ValueError):
    """Operands that do not fit together; says the operation, what was found and what was wanted."""
