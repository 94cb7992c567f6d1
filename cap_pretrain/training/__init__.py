"""What the loop in train.py is made of: set-up, training step, evaluation and bookkeeping."""
