"""A forward pass recorded as a graph, made faster, and replayed without the model's Python code."""
