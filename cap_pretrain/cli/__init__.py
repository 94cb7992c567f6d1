"""Parts shared by the command-line tools in tools/."""
