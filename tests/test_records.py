"""records: every noun survives Parquet, projections read their own columns alone, empty lists keep their type."""

import dataclasses
import inspect
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entropo_ray import records
from entropo_ray.records import (
    Attempt,
    Candidate,
    Example,
    Grade,
    Outcome,
    Stop,
    Task,
    Trajectory,
    Turn,
    Verdict,
    arrow_schema,
    from_row,
    from_table,
    to_row,
    to_table,
)

NOUNS = [
    noun for _, noun in inspect.getmembers(records, dataclasses.is_dataclass) if noun.__module__ == records.__name__
]
FLOAT32 = st.floats(width=32, allow_nan=False)
INT32 = st.integers(-(2**31), 2**31 - 1)
INT64 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)


FLOATS = ("behaviour_logp", "ref_logp", "ref_entropy", "logp", "entropy", "kl")
NARROW = {
    "token_ids": st.lists(INT32, max_size=5).map(tuple),
    **{name: st.lists(FLOAT32, max_size=5).map(tuple) for name in FLOATS},
}


def built(noun):
    """Any record of this kind, with the widths that its columns have."""
    hints = inspect.get_annotations(noun, eval_str=True)
    return st.builds(noun, **{n: NARROW[n] if n in NARROW else st.from_type(h) for n, h in hints.items()})


st.register_type_strategy(str, TEXT)
st.register_type_strategy(Path, TEXT.filter(lambda t: "\0" not in t).map(Path))
st.register_type_strategy(int, INT64)
st.register_type_strategy(float, st.floats(allow_nan=False))
for noun in NOUNS:
    st.register_type_strategy(noun, built(noun))


def verdict(**changes):
    made = Verdict(
        grade=Grade.RESOLVED, passed=("a",), failed=(), dropped=(), exit_code=0, runs=1, seconds=1.5, reason=""
    )
    return dataclasses.replace(made, **changes)


def trajectory(**changes):
    turn = Turn(
        reply="r",
        tool="finish",
        command="finish",
        parse="ok",
        observation="",
        exit_code=0,
        flags=(),
        start=2,
        stop=4,
        generate_s=0.1,
        act_s=0.2,
    )
    made = Trajectory(
        task_id="t",
        sample=1,
        round=0,
        seed=7,
        kind="model",
        scaffold="s",
        prompt="p",
        temperature=0.7,
        turns=(turn,),
        token_ids=(1, 2, 3, 4),
        action_mask=(False, False, True, True),
        behaviour_logp=(0.0, 0.0, -0.5, -0.25),
        num_turns=1,
        num_actions=2,
        num_tokens=9,
        patch_class="",
        patch="diff",
        files=("a.py",),
        stop=Stop.AGENT,
        reason="",
        wall_s=3.0,
        grade=Grade.RESOLVED,
        verdict=verdict(),
    )
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize("noun", NOUNS, ids=lambda n: n.__name__)
def test_every_noun_is_frozen_and_has_a_schema_of_its_fields(noun):
    assert noun.__dataclass_params__.frozen
    assert arrow_schema(noun).names == [field.name for field in dataclasses.fields(noun)]


@pytest.mark.parametrize("noun", NOUNS, ids=lambda n: n.__name__)
def test_every_noun_survives_parquet(noun, tmp_path):
    @settings(max_examples=20, deadline=None)
    @given(st.lists(st.from_type(noun), max_size=3))
    def round_trip(made):
        file = tmp_path / "part.parquet"
        pq.write_table(to_table(noun, made), file)
        assert list(from_table(noun, pq.read_table(file))) == made

    round_trip()


def test_tables_without_rows_or_with_empty_lists_have_the_same_schema():
    """pyarrow alone would infer list<null>, and the first trajectory without turns would break the data set."""
    silent = trajectory(turns=(), token_ids=(), action_mask=(), behaviour_logp=(), verdict=None, grade=None)
    tables = [to_table(Trajectory, rows) for rows in ([], [silent], [trajectory()])]
    assert len({str(table.schema) for table in tables}) == 1
    assert pa.concat_tables(tables).num_rows == 2


def test_token_columns_are_narrow_and_text_columns_are_not():
    schema = arrow_schema(Trajectory)
    assert schema.field("token_ids").type == pa.large_list(pa.int32())
    assert schema.field("behaviour_logp").type == pa.large_list(pa.float32())
    assert schema.field("seed").type == pa.int64()
    assert schema.field("patch").type == pa.large_string()


@pytest.mark.parametrize("projection", [Outcome, Attempt, Example])
def test_projections_are_columns_of_a_trajectory(projection, tmp_path):
    whole = trajectory()
    mine = arrow_schema(projection)
    assert all(arrow_schema(Trajectory).field(name).type == mine.field(name).type for name in mine.names)
    pq.write_table(to_table(Trajectory, [whole]), tmp_path / "part.parquet")
    read = list(from_table(projection, pq.read_table(tmp_path / "part.parquet", columns=mine.names)))
    assert read == [projection(**{name: getattr(whole, name) for name in mine.names})]


def test_a_row_with_columns_to_spare_becomes_a_record():
    assert from_row(Example, to_row(trajectory())).token_ids == (1, 2, 3, 4)


def test_nested_nones_stay_none():
    lost = trajectory(stop=Stop.INFRA_ERROR, grade=None, verdict=None)
    (back,) = from_table(Trajectory, to_table(Trajectory, [lost]))
    assert (back.grade, back.verdict, back.stop) == (None, None, Stop.INFRA_ERROR)


@pytest.mark.parametrize(
    ("grade", "label"),
    [
        (Grade.RESOLVED, True),
        (Grade.UNRESOLVED, False),
        (Grade.EMPTY, False),
        (Grade.PATCH_FAILED, False),
        (Grade.TIMEOUT, None),
        (Grade.TAMPERED, None),
        (Grade.FLAKY, None),
        (None, None),
    ],
)
def test_only_an_answer_of_the_tests_is_a_label(grade, label):
    row = to_row(trajectory(grade=grade)) | {"grade": grade}
    assert from_row(Outcome, row).resolved is label


def test_every_stop_is_finished_or_infra_or_neither_but_never_both():
    assert not [stop for stop in Stop if stop.finished and stop.infra]
    assert Stop.AGENT.finished
    assert not Stop.TOKEN.finished
    assert Stop.INFRA_ERROR.infra
    assert not Stop.ENV_ERROR.infra  # the agent broke its own tree: its doing


@pytest.mark.parametrize("noun", [Task, Candidate], ids=lambda n: n.__name__)
def test_labels_cannot_leak_into_what_a_policy_or_a_selector_sees(noun):
    told = {"grade", "verdict", "resolved", "fail_to_pass", "pass_to_pass", "files", "script"}
    assert not told & set(arrow_schema(noun).names)


def test_a_field_type_without_a_rule_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Odd:
        when: complex

    with pytest.raises(KeyError):
        arrow_schema(Odd)
