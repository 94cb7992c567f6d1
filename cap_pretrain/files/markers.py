"""Names of objects that say what the folder is in which they lie."""

COMMITTED = "commit_success.txt"
"""What Orbax writes last into the folder of a checkpoint."""
