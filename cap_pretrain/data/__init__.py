"""Datasets, image decoding, tokenizers, and the input pipeline that makes batches of them."""
