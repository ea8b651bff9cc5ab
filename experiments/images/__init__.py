"""Image classification, the third experiment of the paper."""
