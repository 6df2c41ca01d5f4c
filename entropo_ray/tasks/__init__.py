"""One issue and its hidden answer: where tasks come from."""
