"""The merge methods by family, as data: settings, formula, paper, what they need and promise."""
