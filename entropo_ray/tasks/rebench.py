"""SWE-rebench: rows in SWE-bench's form with an image and a recipe, from which the script is made."""

from __future__ import annotations

from entropo_ray.tasks import scripts
from entropo_ray.tasks.columns import WORKDIR, Family, Images, Row
from entropo_ray.tasks.pack import Mined
from entropo_ray.tasks.swebench import assemble


def mined(row: Row, images: Images) -> Mined:
    """A row of SWE-rebench. Rows of other languages than Python are refused: their images are laid out otherwise."""
    if row.optional("language") not in ("", "python"):
        raise row.odd("language", "python: images of other languages hold the repository elsewhere")
    recipe = row.mapping("install_config")
    parser = recipe.get("log_parser")
    if not isinstance(parser, str) or not parser:
        raise row.odd("install_config", "a mapping with a text log_parser")
    image = row.optional("docker_image") or row.optional("image_name")
    test_patch, words = row.patch("test_patch"), _words(row, recipe.get("test_cmd"))
    script = scripts.made(
        base=row.commit("base_commit"),
        test_patch=test_patch,
        command=scripts.command(words, scripts.test_files(test_patch)),
        workdir=WORKDIR,
    )
    name = images.name(row, "rebench", "{image}", image=image)
    return assemble(row, source="rebench", image=name, script=script, parser=parser, test_command=words)


def _words(row: Row, command: object) -> str:
    """The test command of a recipe, a text or a list of one text."""
    if isinstance(command, list | tuple) and len(command) == 1:
        command = command[0]
    if not isinstance(command, str) or not command.strip() or "\n" in command.strip():
        raise row.odd("install_config", "a mapping with test_cmd, one line of a command")
    return command.strip()


FAMILY = Family(
    marks=("install_config",),
    columns=(
        "instance_id",
        "repo",
        "base_commit",
        "patch",
        "test_patch",
        "problem_statement",
        "FAIL_TO_PASS",
        "PASS_TO_PASS",
        "install_config",
    ),
    extra=("docker_image", "image_name", "language", "version"),
    split="train",
    mined=mined,
)
