"""SWE-smith: bugs put into repositories. A row's `patch` is the bug, so that the reference patch is its way back.

The published image holds the repaired code, and one commit before a task's branch it does again: the task's checkout
is made of the image's commit and the bug, and its history is dropped. The failing tests lie in the repository already.
"""

from __future__ import annotations

import re

from entropo_ray.records import Answer, Task
from entropo_ray.tasks import diffs, scripts
from entropo_ray.tasks.columns import WORKDIR, Family, Images, Row, pytest_ids
from entropo_ray.tasks.pack import Mined

_PYTEST = "python -m pytest -rA --tb=short -p no:cacheprovider"


def mined(row: Row, images: Images) -> Mined:
    """A row of SWE-smith. Rows of other languages than Python are refused: they name no command."""
    failing, passing = row.texts("FAIL_TO_PASS"), row.texts("PASS_TO_PASS")
    for column, tests in (("FAIL_TO_PASS", failing), ("PASS_TO_PASS", passing)):
        pytest_ids(row, tests, column, "leave the row out")
    bug = row.patch("patch")
    try:
        gold = diffs.reverse(bug)
    except ValueError as error:
        raise row.odd("patch", f"a bug that can be taken back, but {error}") from error
    files = sorted({test.partition("::")[0] for test in (*failing, *passing)})
    task = Task(
        id=row.id,
        source="swesmith",
        split="",  # by repository, once all rows are known
        repo=repository(row.text("repo")),
        image=images.name(row, "swesmith", "{image}", image=row.text("image_name")),
        workdir=WORKDIR,
        problem=row.text("problem_statement"),
        test_command="python -m pytest -q",
        visible=(),
    )
    answer = Answer(
        task_id=row.id,
        patch=gold,
        alternatives=(),
        files=(),
        script=scripts.made(base="HEAD", test_patch="", command=scripts.command(_PYTEST, files), workdir=WORKDIR),
        parser="pytest",
        fail_to_pass=failing,
        pass_to_pass=passing,
        expected_failures=(),
    )
    return Mined(task=task, answer=answer, bug=bug)


def repository(name: str) -> str:
    """owner/name of the project that a row's repository is a copy of: `swesmith/owner__name.1a2b3c4d` says it."""
    project = re.sub(r"\.[0-9a-f]{8}$", "", name.rpartition("/")[2])
    return project.replace("__", "/", 1) if "__" in project else name


FAMILY = Family(
    marks=("image_name",),
    others=("test_patch", "install_config"),
    columns=("instance_id", "repo", "patch", "FAIL_TO_PASS", "PASS_TO_PASS", "image_name", "problem_statement"),
    split="train",
    mined=mined,
)
