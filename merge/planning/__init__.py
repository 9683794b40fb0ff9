"""From the config and the checkpoints' headers to how each tensor is made."""
