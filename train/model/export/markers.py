"""What the chat template writes where tokens cannot be text."""

SPEECH = "<|speech|>"
"""A clip's slots."""

SEAM = "<|seam|>"
"""Text before and after it is tokenised apart, as it was in training."""
