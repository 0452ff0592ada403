"""Generated slides, bags and images. Nothing that runs at a hospital imports them."""
