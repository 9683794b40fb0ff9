"""The parts of `python -m fleet.serve`: many variants of one base over HTTP."""
