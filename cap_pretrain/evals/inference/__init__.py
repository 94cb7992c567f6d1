"""What evaluators share: running a learner over the images and texts of a dataset."""
