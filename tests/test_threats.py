"""The threats that this project answers, and the tests in which each is carried out and fails."""

import ast
from pathlib import Path

import pytest

HERE = Path(__file__).parent
THREATS = {
    1: ("the fix in the history", {"scrub": "a_scrub_removes_each_planted_leak", "grade": "validate_finds_leaks"}),
    2: ("the fix as the last commit", {"scrub": "a_bug_is_put_in_and_its_repair_leaves_no_object"}),
    3: ("hidden tests to read", {"grade": "no_file_of_a_rollout_holds_a_word_of_the_hidden_tests"}),
    4: ("residue of a validation", {"scrub": "each_planted_leak_is_found_and_named", "grade": "validate_finds_leaks"}),
    5: ("files that steer the runner", {"grade": "files_that_steer_the_runner_are_not_graded"}),
    6: ("forged reports", {"grade": "product_code_that_forges_its_run_is_never_resolved"}),
    7: ("tests that vanish", {"grade": "a_test_that_excuses_itself_has_not_passed"}),
    8: ("forged marks and exit codes", {"grade_script": "no_forgery_resolves"}),
    9: ("grading where the agent was", {"grade": "what_an_agent_prepares_in_its_box_does_not_reach_the_grader"}),
    10: ("network", {"sandbox": "there_is_no_network", "docker": "the_agent_has_no_rights_and_no_network"}),
    11: (
        "services of the host and of clouds",
        {"sandbox": "the_host_cannot_be_reached", "conf": "workers_have_no_token_and_are_not_restarted_in_place"},
    ),
    12: (
        "using up the machine",
        {"sandbox": "an_attack_is_contained_and_has_a_named_result", "docker": "swarms_and_killers_end"},
    ),
    13: ("processes that stay", dict.fromkeys(("sandbox", "docker"), "nothing_survives_the_end_of_a_command")),
    14: ("output without end", dict.fromkeys(("sandbox", "docker"), "endless_output_is_drained_and_cut")),
    15: ("bytes that are no text", {"sandbox": "a_patch_keeps_every_byte"}),
    16: ("hostile git", dict.fromkeys(("sandbox", "docker"), "git_obeys_nothing_that_the_agent_wrote")),
    17: ("links that lead out", {"sandbox": "no_link_leads_out", "docker": "links_and_pipes_stay_inside"}),
    18: ("commits of the agent", {"sandbox": "a_patch_carries_the_whole_change"}),
    19: ("nested repositories", {"sandbox": "what_a_patch_cannot_carry_is_said"}),
    20: ("huge and binary files", {"sandbox": "a_hundred_megabytes_of_changes_are_dropped_and_said"}),
    21: ("a lost last newline", {"grade": "patches_of_every_shape_get_a_named_verdict"}),
    22: ("patches longer than a word", {"grade": "patches_of_every_shape_get_a_named_verdict"}),
    23: ("a server inside", {"sandbox": "nothing_of_ours_serves_inside"}),
    24: ("words that read like ours", {"sandbox": "what_reads_like_our_own_words_is_output"}),
    25: ("a printed call", {"episode": "a_call_that_a_command_prints_ends_nothing"}),
    26: (
        "the way out of the kernel's walls",
        {"sandbox": "the_filter_closes_its_calls", "docker": "calls_that_lead_out_are_closed"},
    ),
    27: (
        "a dead sandbox that seems to answer",
        {
            "sandbox": "a_dead_launcher_is_a_lost_sandbox",
            "docker": "a_container_that_is_killed_is_a_lost_sandbox",
            "episode": "an_exception_at_any_await_on_the_sandbox_is_a_row_without_a_gradable_stop",
        },
    ),
    28: ("our trouble as its failure", {"grade": "a_lost_sandbox_is_no_verdict", "rollout": "a_lost_sandbox_is_a_row"}),
    29: (
        "sandboxes left over",
        {
            "pool": "a_killed_pool_leaves_neither_process_nor_mount_nor_group",
            "docker": "reaping_removes_what_dead_owners_left_and_nothing_else",
            "chaos": "ten_minutes_of_kills_leave_nothing",
        },
    ),
    30: ("tests that pass by chance", {"grade": "a_test_that_passes_by_chance_refuses_its_task"}),
    31: ("cross-talk", {"sandbox": "sandboxes_share_neither_ports_nor_files_nor_processes"}),
    32: ("a script rewritten while it runs", {"grade_script": "no_forgery_resolves"}),
    33: ("clock and dice as oracle", {"grade": "two_runs_of_one_patch_are_one_verdict"}),
}


def test_every_threat_has_a_row():
    assert list(THREATS) == list(range(1, 34))


@pytest.mark.parametrize("number", THREATS)
def test_a_threat_is_carried_out_where_it_is_said(number):
    what, tests = THREATS[number]
    assert tests, what
    for name, law in tests.items():
        tree = ast.parse((HERE / f"test_{name}.py").read_text())
        found = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        assert any(test.startswith(f"test_{law}") for test in found), f"{what}: test_{name}.py has no test_{law}"
