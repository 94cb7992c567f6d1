"""`scenes`, the built-in dataset of captioned images that are rendered on the fly."""
