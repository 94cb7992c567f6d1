"""Conceptual Captions 3M: Sharma et al. 2018 (ACL), https://ai.google.com/research/ConceptualCaptions.

Train_GCC-training.tsv and Validation_GCC-1.1.0-Validation.tsv: caption, tab, URL.
"""

from cap_pretrain.data.builders.formats import conceptual


class Dataset(conceptual.Conceptual):
    """Images from the web with one caption each."""

    HOMEPAGE = "https://ai.google.com/research/ConceptualCaptions"
    COLUMNS = ("caption", "url")
