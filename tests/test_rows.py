"""Laws of the readers of public data sets."""
