"""Settings that follow from the size of a dataset and the devices, for `configs/small.py`.

    facts.py   measures a dataset and finds the devices
    rules.py   chooses the settings, each with its reason
    config.py  makes the config of a run from them

The rules depend only on facts that stay the same from one start of a run to the next: the dataset,
the kind and the number of devices, and the objective.
"""
