"""Conceptual 12M: Changpinyo et al. 2021 (arXiv 2102.08981), cc12m.tsv: URL, tab, caption."""

from cap_pretrain.data.builders.formats import conceptual


class Dataset(conceptual.Conceptual):
    """Images from the web with one caption each."""

    HOMEPAGE = "https://github.com/google-research-datasets/conceptual-12m"
    COLUMNS = ("url", "caption")
