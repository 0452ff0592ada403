"""What all segmentation networks ask of their sizes."""

SIDE_MULTIPLE_PX = 32
"""Of the sides of the images that networks take."""
WIDTH_MULTIPLE = 24
"""Of the channels of a network's first stage."""
