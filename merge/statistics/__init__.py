"""What the methods with data gather first, by hooks on images."""
