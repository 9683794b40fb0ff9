"""What is left at the output: whole or not there, with all that belongs to the weights."""
