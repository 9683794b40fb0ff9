"""What is wrong or odd with a folder of checkpoints, and what would probably work on it."""
