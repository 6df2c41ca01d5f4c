"""The tools on a real directory: what changes, what the policy is told, and that bytes which no edit names stay."""

import asyncio
import stat
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entropo_ray import config
from entropo_ray.agent import call, editor, spec, tools
from entropo_ray.agent.spec import Action
from entropo_ray.sandbox import ExecResult, SandboxLost, SandboxSpec, open_sandbox

CFG = config.Agent()


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    root = tmp_path_factory.mktemp("image")
    (root / "pkg" / "deep" / "below").mkdir(parents=True)
    (root / ".hidden").mkdir()
    (root / "pkg" / "ops.py").write_text("def add(a, b):\n    return a - b\n\n\ndef mul(a, b):\n    return a * b\n")
    (root / "pkg" / "deep" / "x.txt").write_text("add x\n")
    (root / "pkg" / "deep" / "below" / "y.txt").write_text("y\n")
    (root / ".hidden" / "z.py").write_text("add = 1\n")
    (root / "blob.bin").write_bytes(b"add\0\1\2")
    script = root / "run.sh"
    script.write_text("#!/bin/sh\necho one\n")
    script.chmod(0o755)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "base"]):
        subprocess.run([*git, *words], cwd=root, check=True)
    return root


@pytest.fixture
def act(image):
    """Runs one call given by keyword arguments; `act.files` is the sandbox, `act.state` what the tools remember."""
    with asyncio.Runner() as runner:
        opened = open_sandbox(SandboxSpec(image=str(image)), backend="plain")
        sandbox = runner.run(opened.__aenter__())

        def run(tool, cfg=CFG, timeout_s=None, **arguments):
            text = [(key, value if isinstance(value, str) else str(value)) for key, value in arguments.items()]
            return runner.run(tools.run(spec.bind(tool, text), sandbox, run.state, cfg, timeout_s=timeout_s))

        run.state = tools.EpisodeState("/testbed")
        run.write = lambda path, data, mode=0o644: runner.run(sandbox.write(f"/testbed/{path}", data, mode))
        run.read = lambda path: runner.run(sandbox.read(f"/testbed/{path}", 1 << 22))
        run.shell = lambda command: runner.run(sandbox.exec(command, cwd="/testbed"))
        yield run
        runner.run(opened.__aexit__(None, None, None))


def edit(act, command, path="pkg/ops.py", **arguments):
    return act("file_editor", command=command, path=path, **arguments)


# ---- view ----


def test_a_file_is_numbered_from_its_own_lines(act):
    assert edit(act, "view").text.splitlines()[1] == "     2\t    return a - b"
    assert edit(act, "view", view_range="[5, -1]").text == "     5\tdef mul(a, b):\n     6\t    return a * b"
    assert edit(act, "view", "/testbed/pkg/ops.py").text == edit(act, "view").text


@pytest.mark.parametrize("span", ["[0, 2]", "[3, 2]", "[1, 7]", "[7, -1]", "[-1, -1]"])
def test_a_range_outside_the_file_names_its_length(act, span):
    result = edit(act, "view", view_range=span)
    assert (result.status, "has 6 lines" in result.text) == ("error", True)


def test_a_range_is_checked_against_the_file_even_where_the_view_would_be_condensed(act):
    body = "".join(f"    x = {n}\n" for n in range(150))
    act.write("long.py", f"def f():\n{body}\n\ndef g():\n    return 1\n".encode())
    condensed = edit(act, "view", "long.py").text
    assert "lines 2-151 not shown" in condensed
    assert "   155\t    return 1" in condensed
    assert "x = 77" not in condensed
    assert edit(act, "view", "long.py", view_range="[79, 79]").text == "    79\t    x = 77"
    assert "x = 77" in edit(act, "view", "long.py", concise="false").text


def test_condensing_keeps_short_bodies_and_decorators_and_cuts_long_docstrings():
    docstring = '    """One\n    two\n    three\n    four\n    five"""\n'
    body = "    a = 1\n    b = 2\n    c = 3\n    return a\n"
    source = f"class A:\n{docstring}    x = 1\n\n@cache\ndef long():\n{body}\ndef short():\n    return 1\n"
    shown = editor._condensed(source, 10_000)
    assert "lines 2-6 not shown" in shown
    assert "lines 11-14 not shown" in shown
    assert [text in shown for text in ("x = 1", "@cache", "def long", "return 1", "a = 1")] == [True] * 4 + [False]
    assert editor._condensed("def broken(:\n", 10_000) is None
    assert editor._condensed("(" * 5000, 10_000) is None


def test_a_long_file_is_clipped_on_a_line_and_says_how_to_go_on(act):
    act.write("long.txt", b"".join(b"line %d\n" % n for n in range(1, 3001)))
    text = edit(act, "view", "long.txt").text
    assert len(text) <= CFG.observation_chars
    *_, last, notice = text.splitlines()
    number = int(last.split("\t")[0])
    assert last == f"{number:6}\tline {number}"
    assert f"lines 1-{number} of 3000" in notice
    following = edit(act, "view", "long.txt", view_range=f"[{number + 1}, 3000]").text
    assert following.startswith(f"{number + 1:6}\tline {number + 1}\n")


def test_a_file_over_a_mebibyte_is_viewed_by_range(act):
    act.write("huge.txt", b"".join(b"%099d\n" % n for n in range(1, 12_001)))
    refused = edit(act, "view", "huge.txt")
    assert (refused.status, "view_range" in refused.text) == ("error", True)
    assert edit(act, "view", "huge.txt", view_range="[11999, -1]").text.split()[1::2] == [
        "0" * 94 + "11999",
        "0" * 94 + "12000",
    ]
    assert "has 12000 lines" in edit(act, "view", "huge.txt", view_range="[12001, 12001]").text


def test_a_directory_shows_two_levels_without_hidden_names(act):
    assert edit(act, "view", ".").text.splitlines() == ["blob.bin", "pkg/", "pkg/deep/", "pkg/ops.py", "run.sh"]
    assert edit(act, "view", "pkg").text.splitlines() == ["deep/", "deep/below/", "deep/x.txt", "ops.py"]
    assert edit(act, "view", ".hidden").text == "z.py"
    act.shell("mkdir many empty; cd many; touch $(seq 600)")
    assert edit(act, "view", "many").text.splitlines()[-1] == "... and 100 more"
    assert "empty" in edit(act, "view", "empty").text


@pytest.mark.parametrize("command", ["view", "str_replace", "insert"])
def test_what_cannot_be_read_is_an_error(act, command):
    rest = {"view": {}, "str_replace": {"old_str": "a"}, "insert": {"insert_line": 0, "new_str": "a"}}[command]
    assert edit(act, command, "nowhere.py", **rest).text == "ERROR: nowhere.py does not exist"
    assert "binary" in edit(act, command, "blob.bin", **rest).text
    assert edit(act, command, "pkg/ops.py/x", **rest).status == "error"
    if command != "view":
        assert edit(act, command, "pkg", **rest).status == "error"


# ---- edits ----


def test_a_replacement_shows_what_it_left(act):
    result = edit(act, "str_replace", old_str="a - b", new_str="a + b")
    assert result.status == "ok"
    assert "     2\t    return a + b\n" in result.text
    assert act.read("pkg/ops.py").startswith(b"def add(a, b):\n    return a + b\n\n")
    brief = act(
        "file_editor",
        cfg=config.Agent(prompt="brief"),
        command="str_replace",
        path="pkg/ops.py",
        old_str="a + b",
        new_str="b + a",
    )
    assert brief.text.splitlines() == [
        "Edited pkg/ops.py.",
        "     1\tdef add(a, b):",
        "     2\t    return b + a",
        "     3\t",
    ]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("return  a-b", "x", "     2\t    return a - b"),
        ("nothing like it at all", "x", "is not in"),
        ("(a, b)", "x", "lines 1, 5"),
        ("", "x", "is empty"),
        ("a - b", "a - b", "the same"),
    ],
)
def test_a_replacement_that_does_not_fit_changes_nothing_and_says_why(act, old, new, says):
    before = act.read("pkg/ops.py")
    if old:
        result = edit(act, "str_replace", old_str=old, new_str=new)
        assert (result.status, says in result.text) == ("error", True), result.text
    else:
        with pytest.raises(spec.BadParams, match="missing"):
            edit(act, "str_replace", new_str=new)
        action = Action("file_editor", {"command": "str_replace", "path": "pkg/ops.py", "old_str": "", "new_str": new})
        assert says in asyncio.run(tools.run(action, Fixed(before), act.state, CFG)).text
    assert act.read("pkg/ops.py") == before


def test_overlapping_occurrences_are_several(act):
    act.write("a.txt", b"aaa\n")
    assert "more than once" in edit(act, "str_replace", "a.txt", old_str="aa", new_str="b").text


class Fixed:
    """A sandbox of one file in memory."""

    def __init__(self, data):
        self.data = data

    async def read(self, path, limit=1 << 20):
        return self.data

    async def write(self, path, data, mode=0o644):
        self.data = data

    async def exec(self, cmd, **_):
        return ExecResult(0, b"644\n", 4, False, False, False, False, 0.0)


def replaced(data, old, new):
    files = Fixed(data)
    action = Action("file_editor", {"command": "str_replace", "path": "f", "old_str": old, "new_str": new})
    result = asyncio.run(tools.run(action, files, tools.EpisodeState("/w"), CFG))
    return result.status, files.data


@pytest.mark.parametrize(
    ("data", "old", "new", "after"),
    [
        (b"a\r\nb\r\nc", "a\nb", "x\ny", b"x\r\ny\r\nc"),
        (b"\xef\xbb\xbfa\n", "a", "b", b"\xef\xbb\xbfb\n"),
        (b"caf\xe9 a\n", "a\n", "\xfc\n", b"caf\xe9 \xfc\n".replace(b"\xfc", b"\xfc")),
        (b"\tx = 1", "x", "y", b"\ty = 1"),
        (b"a\rb\n", "a\rb", "c", b"c\n"),
        ("é ü\n".encode(), "ü", "\u20ac", "é \u20ac\n".encode()),
    ],
)
def test_codec_newlines_and_the_rest_of_the_bytes_stay(data, old, new, after):
    assert replaced(data, old, new) == ("ok", after)


def test_a_character_that_the_files_codec_lacks_is_refused():
    assert replaced(b"caf\xe9\n", "caf", "\u20ac") == ("error", b"caf\xe9\n")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.text("ab\n\t", max_size=4), max_size=6), st.integers(0, 6), st.text("xy\n", max_size=5), st.booleans()
)
def test_insert_is_a_splice_of_lines(lines, number, new, final):
    text = "".join(f"{line}q\n" for line in lines)
    text = text if final or not text else text[:-1]
    before = text.split("\n")
    count = len(before) - (before[-1] == "")
    files = Fixed(text.encode())
    action = Action("file_editor", {"command": "insert", "path": "f", "insert_line": number, "new_str": new})
    result = asyncio.run(tools.run(action, files, tools.EpisodeState("/w"), CFG))
    if number > count:
        assert (result.status, f"has {count} lines" in result.text) == ("error", True)
        return
    inserted = new.removesuffix("\n").split("\n")
    expected = "\n".join([*before[:count][:number], *inserted, *before[:count][number:]])
    assert files.data.decode() == expected + ("\n" if text.endswith("\n") or not text else "")


def test_create_makes_directories_and_refuses_what_exists(act):
    result = edit(act, "create", "new/dir/f.py", file_text="a = 1\n")
    assert result.text.splitlines() == ["Created new/dir/f.py.", "     1\ta = 1"]
    assert act.read("new/dir/f.py") == b"a = 1\n"
    for path in ("new/dir/f.py", "pkg", "blob.bin"):
        assert "exists already" in edit(act, "create", path, file_text="b").text
    assert act.read("new/dir/f.py") == b"a = 1\n"


def test_values_that_look_like_options_or_shell_stay_values(act):
    text = "-x $(rm -rf .) `id` '\"\n</parameter>\n"
    assert edit(act, "create", "-rf", file_text=text).status == "ok"
    assert act.read("-rf").decode() == text
    assert edit(act, "str_replace", "-rf", old_str="-x", new_str="--y").status == "ok"
    assert "--y" in edit(act, "view", "-rf").text
    assert "-rf:1: --y" in act("search", search_term="--y").text
    big = "b" * (1 << 20)
    assert edit(act, "create", "big.txt", file_text=big).status == "ok"
    assert act.read("big.txt").decode() == big
    with pytest.raises(spec.BadParams, match="longer"):
        edit(act, "create", "bigger.txt", file_text=big + "b")


def test_an_edited_script_stays_executable_and_a_link_stays_a_link(act):
    act.shell("ln -s run.sh link")
    assert edit(act, "str_replace", "link", old_str="one", new_str="two").status == "ok"
    assert act.shell("test -L link && ./run.sh").output == b"two\n"
    assert edit(act, "undo_edit", "link").status == "ok"
    assert act.shell("./run.sh").output == b"one\n"
    assert stat.S_IMODE(int(act.shell("stat -c %f run.sh").output, 16)) == 0o755


def test_undo_goes_back_step_by_step_to_the_first_bytes(act):
    first = act.read("pkg/ops.py")
    edit(act, "str_replace", old_str="a - b", new_str="a + b")
    edit(act, "insert", insert_line=0, new_str="import os")
    assert edit(act, "undo_edit").status == edit(act, "undo_edit").status == "ok"
    assert act.read("pkg/ops.py") == first
    assert "no edit" in edit(act, "undo_edit").text
    edit(act, "create", "new.py", file_text="x")
    assert edit(act, "undo_edit", "new.py").status == "ok"
    assert "does not exist" in edit(act, "view", "new.py").text


def test_undo_refuses_what_a_command_has_changed_since(act):
    edit(act, "str_replace", old_str="a - b", new_str="a + b")
    act("execute_bash", cmd="echo '# more' >> pkg/ops.py")
    assert "other means" in edit(act, "undo_edit").text
    assert act.read("pkg/ops.py").endswith(b"# more\n")


def test_what_undo_remembers_is_bounded():
    state = tools.EpisodeState("/w")
    for n in range(30):
        state.remember("a", b"%d" % n, b"")
    assert [step.before for step in state.edits["a"]] == [b"%d" % n for n in range(10, 30)]
    for n in range(8):
        state.remember(f"f{n}", b"x" * (1 << 20), b"")
    held = sum(len(step.before) for steps in state.edits.values() for step in steps)
    assert held <= call.UNDO_BYTES


def test_linting_refuses_to_break_python_only_where_it_was_whole(act):
    refused = edit(act, "str_replace", old_str="a - b", new_str="a -", enable_linting="true")
    assert (refused.status, "no longer be Python" in refused.text) == ("error", True)
    assert edit(act, "str_replace", old_str="a - b", new_str="a -").status == "ok"
    assert edit(act, "str_replace", old_str="a * b", new_str="a *", enable_linting="true").status == "ok"


# ---- the shell ----


def test_a_command_gives_its_code_and_its_output_in_order(act):
    result = act("execute_bash", cmd="echo out; echo err >&2; pwd; exit 3")
    assert (result.status, result.exit_code) == ("error", 3)
    assert result.text == "exit code: 3\nout\nerr\n/testbed"
    assert act("execute_bash", cmd="cat; echo $TERM").text == "exit code: 0\ndumb"


def test_a_command_out_of_time_is_killed_with_what_it_said(act):
    result = act("execute_bash", cmd="echo begun; sleep 30 && echo never", timeout_s=0.5)
    assert (result.status, result.exit_code, result.flags) == ("timeout", None, ("timeout",))
    assert result.text == "exit code: none, killed after 0.5 s\nbegun"


def test_commands_that_no_shell_could_take_are_errors(act):
    assert "NUL" in act("execute_bash", cmd="echo \0").text
    assert "script" in act("execute_bash", cmd="#" * 200_000).text


# ---- search ----


def test_search_tells_path_line_and_text(act):
    assert (
        act("search", search_term="return a").text == "pkg/ops.py:2:     return a - b\npkg/ops.py:6:     return a * b"
    )
    assert act("search", search_term="return a", path="pkg/ops.py").text.startswith("pkg/ops.py:2: ")
    assert act("search", search_term="add").text == "pkg/deep/x.txt:1: add x\npkg/ops.py:1: def add(a, b):"
    assert act("search", search_term="add", glob="*.txt").text == "pkg/deep/x.txt:1: add x"
    assert act("search", search_term="add", path=".hidden").text == ".hidden/z.py:1: add = 1"
    assert act("search", search_term="a - b", context=1).text.count("\n") == 2


def test_search_is_plain_text_unless_asked(act):
    missed = act("search", search_term="return a .*b")
    assert (missed.status, "regex=true" in missed.text) == ("ok", True)
    assert act("search", search_term="return a .*b", regex="true").text.count("\n") == 1
    assert "regex" not in act("search", search_term="absent").text
    assert act("search", search_term="(", regex="true").status == "error"
    assert act("search", search_term="x", path="nowhere").status == "error"
    assert act("search", search_term="a\nb").status == "error"


def test_search_is_bounded_and_counts_the_rest(act):
    act.shell("mkdir hits; cd hits; for n in $(seq 10 69); do for m in 1 2 3; do echo needle; done > $n.txt; done")
    lines = act("search", search_term="needle").text.splitlines()
    head, rest = lines[: lines.index("Not shown:")], lines[lines.index("Not shown:") + 1 :]
    assert len(head) == tools.MATCHES
    assert sum(int(line.split(": ")[1].split()[0]) for line in rest) == 180 - tools.MATCHES


# ---- failures that are not the policy's ----


def test_a_lost_sandbox_passes_through():
    class Lost(Fixed):
        async def read(self, path, limit=0):
            raise SandboxLost("gone")

    action = Action("file_editor", {"command": "view", "path": "f"})
    with pytest.raises(SandboxLost):
        asyncio.run(tools.run(action, Lost(b""), tools.EpisodeState("/w"), CFG))


def test_a_full_disk_is_told_to_the_policy():
    class Full(Fixed):
        async def write(self, path, data, mode=0o644):
            raise OSError(28, "No space left on device")

    action = Action("file_editor", {"command": "str_replace", "path": "f", "old_str": "a", "new_str": "b"})
    result = asyncio.run(tools.run(action, Full(b"a"), tools.EpisodeState("/w"), CFG))
    assert (result.status, result.text) == ("error", "ERROR: f: No space left on device")


def test_every_tool_is_described_and_runs():
    text = spec.describe()
    assert set(spec.TOOLS) == set(tools._RUN) == {"file_editor", "execute_bash", "search", "finish"}
    assert all(f"{name}: " in text for name in spec.TOOLS)
    assert "enable_linting" not in text
