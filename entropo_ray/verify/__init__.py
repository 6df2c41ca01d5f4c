"""A verifier: the probability that a patch resolves its issue, told without running anything."""
