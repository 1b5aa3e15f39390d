"""For people at a prompt: the command line, and the reports behind it."""
