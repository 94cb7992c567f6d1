"""TFDS builders that write ArrayRecord datasets without TensorFlow."""
