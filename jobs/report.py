"""A run as one page, or one attempt of it turn by turn; nothing is computed anew.

python jobs/report.py runs/local/config.yaml
python jobs/report.py runs/local/config.yaml round=0 task=ID sample=3
"""

import sys

from entropo_ray import config, observe, report

_ATTEMPT = ("round", "task", "sample")


def main(cfg: config.Run, asked: dict[str, str]) -> None:
    if "task" in asked:
        page = report.trajectory(
            cfg.run_dir, round=number(asked, "round"), task_id=asked["task"], sample=number(asked, "sample")
        )
    else:
        print(report.table(cfg.run_dir))
        page = report.write(cfg.run_dir)
    print(f"report: {page}")


def number(asked: dict[str, str], key: str) -> int:
    value = asked.get(key, "0")
    if not value.isdecimal():
        raise ValueError(f"{key}={value}: must be a whole number, at least 0")
    return int(value)


if __name__ == "__main__":
    words = {word: word.partition("=") for word in sys.argv[1:]}
    attempt = {key: value for key, _, value in words.values() if key in _ATTEMPT}
    sys.argv[1:] = [word for word, (key, _, _) in words.items() if key not in _ATTEMPT]
    observe.entry(lambda cfg: main(cfg, attempt))
