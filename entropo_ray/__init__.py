"""EntroPO for coding agents on Ray."""
