"""Tokenizers, vocabularies of words, and captions with their words reordered."""
