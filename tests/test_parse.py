"""The codec: every action comes back as it was, and every reply that holds none is told why."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entropo_ray.agent import parse, spec
from entropo_ray.agent.parse import ParseStatus
from entropo_ray.agent.spec import Action

TAGS = ["<function=", "</function>", "<parameter=", "</parameter>", "<tool_call>", "<|im_end|>", "<think>", "</think>"]
PIECES = [
    *TAGS,
    "<\\function=",
    "<\\\\/parameter>",
    "\n",
    "\r\n",
    "\\",
    "<",
    ">",
    " ",
    "\t",
    "-x",
    "'",
    '"',
    "a=b",
    "é",
    "a",
]
values = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12).map("".join)
names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)


def raw(value):
    """The text between the tags of one parameter."""
    text = parse.write("f", [("p", value)])
    return text.removeprefix("<function=f>\n  <parameter=p>").removesuffix("</parameter>\n</function>")


def value(text):
    return parse.read(f"<function=f>\n  <parameter=p>{text}</parameter>\n</function>").values[0][1]


@settings(max_examples=400, deadline=None)
@given(
    names,
    st.lists(st.tuples(names, values), max_size=4),
    values.filter(lambda text: parse.OPENING.search(text) is None and not text.lstrip().startswith("<think>")),
    st.sampled_from(["", "\n", "</tool_call>", "\n</tool_call>\n", " \t"]),
)
def test_every_call_comes_back_identical(name, arguments, prefix, suffix):
    call = parse.read(prefix + parse.write(name, arguments) + suffix)
    assert (call.name, list(call.values), call.trailing) == (name, arguments, False)


spans = st.tuples(st.integers(-9, 99), st.integers(-9, 99))
words = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1).map(str.strip).filter(bool)


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.builds(lambda p, r: {"command": "view", "path": p, "view_range": r}, words, spans),
        st.builds(lambda p, c: {"command": "view", "path": p, "concise": c}, words, st.booleans()),
        st.builds(
            lambda p, o, n: {"command": "str_replace", "path": p, "old_str": o, "new_str": n}, words, values, values
        ),
        st.builds(
            lambda p, i, n: {"command": "insert", "path": p, "insert_line": i, "new_str": n},
            words,
            st.integers(0, 99),
            values,
        ),
    )
)
def test_typed_actions_come_back_as_bound(arguments):
    action = Action("file_editor", arguments)
    parsed = parse.parse(f"I edit it.\n{parse.encode(action)}")
    assert parsed.action == action, parsed
    assert (parsed.status, parsed.trailing) == (ParseStatus.OK, False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("    return 1\n", "    return 1\n"),
        ("\nls -la\n", "ls -la"),
        ("\nfoo", "\nfoo"),
        ("\n", "\n"),
        ("", ""),
        ("print('</parameter>')\nx", "print('</parameter>')\nx"),
        ("<\\/parameter>", "</parameter>"),
        ("a <b> < c", "a <b> < c"),
    ],
)
def test_golden_raw_text_to_value(text, expected):
    assert value(text) == expected


@pytest.mark.parametrize(
    ("plain", "expected"),
    [
        ("-x", "-x"),
        ("    return 1\n", "\n    return 1\n\n"),
        ("\n", "\n\n\n"),
        ("</parameter>", "<\\/parameter>"),
        ("<\\/function>", "<\\\\/function>"),
        ("\r\n", "\n\r\n\n"),
        (" x", "\n x\n"),
        ("a < b", "a < b"),
    ],
)
def test_golden_value_to_raw_text(plain, expected):
    assert raw(plain) == expected
    assert value(raw(plain)) == plain


CALL = "<function=finish>\n</function>"


@pytest.mark.parametrize(
    ("reply", "status", "says"),
    [
        ("", ParseStatus.NO_CALL, "<function=NAME>"),
        ("I would call <function=finish> now.", ParseStatus.NO_CALL, "exactly one"),
        ("<think>" + CALL, ParseStatus.NO_CALL, "exactly one"),
        ("<function=execute_bash>\n<parameter=cmd>ls", ParseStatus.UNTERMINATED, "</parameter>"),
        ("<function=execute_bash>\n<parameter=cmd>ls</parameter>", ParseStatus.UNTERMINATED, "</function>"),
        ("<function=execute_bash>\n<parameter=cmd>ls</function>", ParseStatus.UNTERMINATED, "</parameter>"),
        ("<function=execute_bash><parameter=>ls</parameter></function>", ParseStatus.UNTERMINATED, "name"),
        (
            f"<function=execute_bash><parameter=cmd>{CALL}</parameter></function>",
            ParseStatus.AMBIGUOUS,
            "<\\/function>",
        ),
        (f"{CALL}</function>", ParseStatus.AMBIGUOUS, "closing"),
        (f"{CALL}</parameter>", ParseStatus.AMBIGUOUS, "closing"),
        (f"{CALL}\nand\n{CALL}{CALL}", ParseStatus.MULTIPLE_CALLS, "3 calls"),
        ("<function=browse></function>", ParseStatus.UNKNOWN_TOOL, "browse"),
        ("<function=execute_bash></function>", ParseStatus.BAD_PARAMS, "cmd"),
        ("<function=execute_bash><parameter=cmd> </parameter></function>", ParseStatus.BAD_PARAMS, "empty"),
        ("<function=search><parameter=term>x</parameter></function>", ParseStatus.BAD_PARAMS, "search_term"),
    ],
)
def test_every_status_speaks(reply, status, says):
    parsed = parse.parse(reply)
    assert (parsed.status, parsed.action) == (status, None)
    assert says in parsed.message


def test_the_statuses_above_and_ok_are_all_there_are():
    marks = test_every_status_speaks.pytestmark
    covered = {case[1] for case in marks[0].args[1]}
    assert covered | {ParseStatus.OK} == set(ParseStatus)


def test_a_mention_in_prose_is_no_call():
    parsed = parse.parse(f"Not <function=search> but\n<tool_call>{CALL}</tool_call>")
    assert parsed.action == Action("finish", {})


def test_thinking_is_not_searched():
    call = parse.encode(Action("execute_bash", {"cmd": "ls"}))
    assert parse.parse(f"<think>maybe {CALL}</think>{call}").action == Action("execute_bash", {"cmd": "ls"})


def test_text_behind_a_call_is_flagged_and_not_lost():
    parsed = parse.parse(f"{CALL}\nThat is all.")
    assert (parsed.status, parsed.trailing) == (ParseStatus.OK, True)


def test_all_faults_of_a_call_are_named_at_once():
    text = parse.write(
        "file_editor", [("command", "insert"), ("path", "a"), ("path", "b"), ("insert_line", "x"), ("y", "")]
    )
    message = parse.parse(text).message
    assert "path is given twice" in message
    assert "insert_line: must be a whole number" in message
    assert "no parameter y" in message
    assert "new_str (text) is missing" in message


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("range", "[3, -1]", (3, -1)),
        ("range", "3,9", (3, 9)),
        ("range", " 3 9 ", (3, 9)),
        ("bool", "TRUE", True),
        ("bool", "0", False),
        ("int", " 12 ", 12),
        ("word", " a/b.py\n", "a/b.py"),
        ("str", " a ", " a "),
    ],
)
def test_parameter_types(kind, text, expected):
    assert spec._convert(spec.Param("p", kind, ""), text) == expected


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("range", "[1, x]"),
        ("range", "__import__('os')"),
        ("bool", "yes"),
        ("int", "1.0"),
        ("int", "9" * 5000),
        ("word", "a\nb"),
    ],
)
def test_mistyped_parameters_are_refused(kind, text):
    with pytest.raises(ValueError, match="must"):
        spec._convert(spec.Param("p", kind, ""), text)


def test_the_published_alias_of_cmd_is_accepted():
    assert parse.parse(parse.write("execute_bash", [("command", "ls")])).action == Action("execute_bash", {"cmd": "ls"})


@pytest.mark.parametrize(
    "text",
    [
        "</parameter>" + " " * (1 << 20),
        "</parameter>\n" * 80_000,
        "<\\" + "\\" * (1 << 20),
        "<" * (1 << 20),
        "<function=a>  " * 70_000,
        "<parameter=" + "a" * (1 << 20),
        "</parameter><parameter=" + "a" * (1 << 20),
    ],
)
def test_hostile_replies_are_read_in_linear_time(text):
    begun = time.perf_counter()
    for reply in (text, f"<function=execute_bash>\n<parameter=cmd>{text}", parse.write("f", [("p", text)])):
        parse.parse(reply)
    assert time.perf_counter() - begun < 2.0  # quadratic would take minutes
