"""RotationPenalty in other people's training loops: one file per framework, named after it, which imports it.

Nothing here is imported with the package. docs/training.md says which hook each file takes, and why.
"""
