"""Benchmarks, side by side in one run: a table of ratios and memory, and one JSON object as the last line.

    python jobs/bench.py trainer [key=value ...]    a step of ours beside TRL's DPOTrainer and KTOTrainer
    python jobs/bench.py logprob [key=value ...]    the head alone, by length: tiles and full logits
    python jobs/bench.py ranks [key=value ...]      an update over ranks and ZeRO stages: time, memory, expected memory
    python jobs/bench.py sandbox [key=value ...]    sandboxes: operations, throughput, a thousand at once; with
                                                    docker_image=REFERENCE Docker's too, by turns with `docker run`

Keys: those of the classes Trainer, Logprob, Ranks and Boxes (trainer.py, head.py, ranks.py, boxes.py in
entropo_ray/bench).
"""

import json
import sys
from collections.abc import Callable
from typing import Any

from entropo_ray import config
from entropo_ray.bench import boxes, head, ranks, trainer

WHAT: dict[str, tuple[type[Any], Callable[[Any], dict[str, Any]]]] = {
    "trainer": (trainer.Trainer, trainer.run),
    "logprob": (head.Logprob, head.run),
    "ranks": (ranks.Ranks, ranks.run),
    "sandbox": (boxes.Boxes, boxes.run),
}


def main(words: list[str]) -> dict[str, Any]:
    if not words or words[0] not in WHAT:
        raise ValueError(f"{words[0] if words else 'nothing'}: no such benchmark; give one of {', '.join(WHAT)}")
    schema, run = WHAT[words[0]]
    return run(config.load(schema, words[1:]))


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        sys.exit(0)
    try:
        print(json.dumps(main(sys.argv[1:])))
    except ValueError as error:
        sys.exit(f"error: {error}")
