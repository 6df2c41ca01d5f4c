"""Episodes by the thousand: vLLM engines, the classes that Ray Data maps, and the stages `sample`, `teach`, `retell`."""
