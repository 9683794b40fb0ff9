"""Pictures of a run: each takes a results folder and returns a matplotlib figure."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
