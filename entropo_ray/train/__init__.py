"""Where a policy learns: imitation of action tokens, and the EntroPO update from pairs or labels."""
