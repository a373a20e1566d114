"""What a plan costs in quality, against the dense model on the same text."""
