"""Low-rank adapters as PEFT writes them: onto a base, several into one, out of a fine-tune."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
