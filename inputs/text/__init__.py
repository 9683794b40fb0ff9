"""Text to learn from: the docstrings of Python's standard library, tokens, a small encoder."""
