"""Names that figures of a run have, where they are written and where they are read."""

TEXT = "text"
"""Stands for a visual-token count where a sample has no image."""
VALIDATION = "validation"
"""The section of what validations find."""
COUNTED = "images_per_count"
"""The figure that is drawn as a histogram: {count: images}."""
