"""The command line for people at a prompt, and the reports behind it."""
