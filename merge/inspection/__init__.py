"""A look at several models beside each other: norms, cosines, sign conflicts."""
