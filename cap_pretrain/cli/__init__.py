"""Parts shared by the commands of `cap`."""
