from __future__ import annotations

import re
from pathlib import Path

import pytest

from exchange_ranks import (
    DISAGREEMENTS,
    ODD,
    REFUSALS,
    Outcome,
    disagree,
    fail_inside,
    forced_parts,
    keeper_killed,
    killed_before,
    killed_inside,
    missed_calls,
    not_finite,
    one_is_late,
    one_stays_away,
    refuse,
    refuse_in_a_list,
    refuse_without_a_model,
    two_groups,
)
from ranks import Keeper, run_ranks

TIMEOUT = 10.0
WRAPPERS = ["fsdp2", "ddp"]


def check_lost(outcomes: list[Outcome], message: str, timeout: float = TIMEOUT) -> None:
    for outcome in outcomes:
        assert outcome.kind == "RuntimeError" and outcome.unchanged, outcome
        assert message in outcome.message, outcome
        # They wait a little for each other's word, too.
        assert outcome.seconds < timeout + 5, outcome


def check_silent(outcomes: list[Outcome]) -> None:
    """A rank that waits for a living one learns of nothing until gloo's timeout: until then it may be the dead one."""
    check_lost(outcomes, "")
    exact = f": rank {ODD} came to this call and fell silent in the middle of it; no gradient"
    assert any(exact in outcome.message for outcome in outcomes), outcomes
    for outcome in outcomes:
        assert exact in outcome.message or re.search(rf"at least one of ranks (0, )?{ODD}(, 2)? came", outcome.message)


KILLED = [("fsdp2", "accumulate", "file"), ("fsdp2", "penalty", "launcher"), ("ddp", "accumulate", "launcher")]


@pytest.mark.parametrize(("wrapper", "call", "keeper"), KILLED)
def test_a_rank_that_died_before_the_call_is_named(wrapper: str, call: str, keeper: Keeper) -> None:
    results = run_ranks(3, killed_before, wrapper, call, killed=(ODD,), timeout=TIMEOUT, keeper=keeper)
    check_lost([results[0], results[2]], f": rank {ODD} never came to this call; no gradient")


@pytest.mark.parametrize(("wrapper", "call", "keeper", "bucket"), [(*case, i) for i, case in enumerate(KILLED)])
def test_a_rank_that_dies_in_the_middle_is_named(wrapper: str, call: str, keeper: Keeper, bucket: int) -> None:
    results = run_ranks(3, killed_inside, wrapper, call, bucket, killed=(ODD,), timeout=TIMEOUT, keeper=keeper)
    check_silent([results[0], results[2]])


def test_a_rank_that_comes_late_is_not_taken_for_the_one_that_died() -> None:
    results = run_ranks(3, one_is_late, killed=(ODD,), timeout=TIMEOUT)
    check_lost([results[0], results[2]], f": rank {ODD} never came to this call; no gradient")


def test_a_rank_that_stays_away_is_named_after_the_timeout() -> None:
    results = run_ranks(3, one_stays_away, timeout=4.0)
    check_lost([results[0], results[2]], f": rank {ODD} never came to this call; no gradient", 4.0)


@pytest.mark.parametrize("inside", [False, True])
def test_a_job_without_a_store_says_so(inside: bool) -> None:
    results = run_ranks(3, keeper_killed, inside, killed=(0,), timeout=TIMEOUT, keeper="rank 0")
    check_lost(results[1:], "the job's store, which rank 0 or the launcher keeps")


def test_calls_that_a_rank_missed_are_not_held_against_it_later() -> None:
    results = run_ranks(3, missed_calls, killed=(ODD,), timeout=TIMEOUT)
    check_silent([results[0], results[2]])


def check_refused(outcomes: list[Outcome], message: str) -> None:
    for outcome in outcomes:
        assert outcome.kind == "ValueError" and outcome.unchanged, outcome
        assert message in outcome.message, outcome


def check_served(outcomes: list[Outcome], changed: bool = True) -> None:
    for outcome in outcomes:
        assert outcome.kind == "" and outcome.unchanged != changed, outcome
        assert outcome.penalty == outcomes[0].penalty > 0


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_rank_whose_weights_are_not_finite_is_named(wrapper: str) -> None:
    for outcomes in zip(*run_ranks(3, not_finite, wrapper, ODD), strict=True):
        for bad in zip(*(each[:3] for each in outcomes), strict=True):
            check_refused(list(bad), f"NaN or infinity in the drifts of rank {ODD}, ")
        check_served([each[3] for each in outcomes], changed=False)
        check_served([each[4] for each in outcomes])


def test_the_rank_is_named_by_its_place_in_the_job() -> None:
    """The second of two replicas, each sharded over two ranks, is bad: it refuses alone."""
    for outcomes in zip(*run_ranks(4, not_finite, "fsdp2", 3, (2, 2)), strict=True):
        for each in outcomes[2:]:
            check_refused(each[:3], "NaN or infinity in the drifts of rank 3, ")
        for each in outcomes[:2]:
            check_served(each[:1], changed=False)
            check_served(each[1:3])


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_ranks_that_disagree_refuse_together(wrapper: str) -> None:
    results = run_ranks(3, disagree, wrapper, timeout=TIMEOUT)
    for case in DISAGREEMENTS:
        outcomes = [result[case] for result in results]
        check_refused([each[0] for each in outcomes], f"anchors: got others on rank {ODD} than on the rest of 3 ranks")
        check_served([each[1] for each in outcomes])


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_where_one_rank_refuses_all_do(wrapper: str) -> None:
    results = run_ranks(3, refuse, wrapper, timeout=TIMEOUT)
    for case, (_, kind, message) in REFUSALS.items():
        outcomes = [result[case] for result in results]
        own = outcomes[ODD][0]
        assert own.kind == kind and own.unchanged and message in own.message, own
        check_refused([outcomes[0][0], outcomes[2][0]], f"rank {ODD} refused this call for a reason that it raises")
        check_served([each[1] for each in outcomes])


@pytest.mark.parametrize("wrapper", ["fsdp2", "ddp"])
def test_a_rank_that_fails_in_the_middle_is_told_to_all(wrapper: str) -> None:
    for rank, found in enumerate(run_ranks(2, fail_inside, wrapper, timeout=TIMEOUT)):
        for call, (failed, right) in found.items():
            if rank == ODD:
                assert (failed.kind, failed.message) == ("MemoryError", "no memory for C"), (call, failed)
            else:
                assert failed.kind == "ValueError" and "rank 1 failed" in failed.message, (call, failed)
            assert failed.unchanged and right.kind == "", (call, failed, right)


def test_where_one_rank_refuses_a_list_all_do() -> None:
    results = run_ranks(3, refuse_in_a_list, timeout=TIMEOUT)
    check_refused([results[ODD][0]], "anchors: got 2 for 3 weights")
    check_refused([results[0][0], results[2][0]], f"rank {ODD} refused this call")
    check_served([result[1] for result in results])


def test_where_one_rank_has_no_model_all_refuse(tmp_path: Path) -> None:
    """Its anchors know whom to tell. Alone with such a call it raises its own error all the same."""
    other, (*odd, alone) = run_ranks(2, refuse_without_a_model, str(tmp_path / "anchors"), timeout=5)
    check_refused(odd[::2], "got NoneType, expected a t")
    check_refused(other[::2], f"rank {ODD}")
    for outcome in (*odd[1::2], *other[1::2]):
        assert not outcome.kind, outcome
    check_refused([alone], "weights: got NoneType, expected a tensor")


@pytest.mark.parametrize("problem", ["refuses", "disagrees"])
def test_a_refusal_reaches_ranks_of_other_groups(problem: str) -> None:
    results = run_ranks(4, two_groups, problem, timeout=TIMEOUT)
    check_refused([result[0] for result in results], "")
    assert "rank 1 refused" in results[0][0].message or "rank 2 refused" in results[0][0].message
    for result in results:
        assert result[1].kind == "", result


def test_no_rank_waits_for_those_of_another_group_that_are_not_finite() -> None:
    results = run_ranks(4, two_groups, "not finite", timeout=TIMEOUT)
    check_refused([result[0] for result in results[1:]], "NaN or infinity in the drifts of rank 3, ")
    # It shares no sum with rank 3.
    assert results[0][0].kind == ""


def test_parts_of_another_layout_are_refused_by_name() -> None:
    results = run_ranks(3, forced_parts, "fsdp2", (24, 512, 24, 40), 8, (0, 0, 2), timeout=TIMEOUT)
    check_refused([results[1]], "0.weight: got an anchor of rows 0:171, columns 0:24, expected one of rows 171:342")
    check_refused([results[0], results[2]], "rank 1 refused this call")


@pytest.mark.parametrize(
    ("sizes", "taken_from", "named"),
    [
        # Both ranks have the first layer's anchors: as many elements as both layers have.
        ((64, 64, 64), (0, 0), "0.weight (8192 of 4096 elements), 1.weight (0 of 4096 elements);"),
        # The first and the last quarter twice, of one weight: the right number, and the right mean row.
        ((32, 512), (0, 0, 3, 3), "0.weight (16384 of 16384 elements);"),
        ((32, 512), (0, 1, 2, 2), "0.weight (16384 of 16384 elements);"),
    ],
)
def test_parts_that_do_not_cover_the_weights_are_refused_by_name(
    sizes: tuple[int, ...], taken_from: tuple[int, ...], named: str
) -> None:
    results = run_ranks(len(taken_from), forced_parts, "ddp", sizes, 8, taken_from, timeout=TIMEOUT)
    check_refused(results, f"anchors: got parts that do not make up the whole weights: {named}")
