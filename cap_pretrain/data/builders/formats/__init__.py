"""Input formats of datasets, one module each; see `cap_pretrain.data.builders` for adding one."""
