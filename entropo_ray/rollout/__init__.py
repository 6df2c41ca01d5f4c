"""Episodes by the thousand: vLLM engines, the classes that Ray Data maps, the stages `sample`, `teach` and `retell`."""
