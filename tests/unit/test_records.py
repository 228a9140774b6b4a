import copy
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest

from megatron_tip.records import Numbers, Rollout, logprobs, token_ids


def test_numbers_are_the_tuple_that_they_hold():
    ids = token_ids([3, 1, 2])
    assert (len(ids), list(ids), ids[-1], ids[1:], max(ids)) == (3, [3, 1, 2], 2, (1, 2), 3)
    assert ids == (3, 1, 2)
    assert ids == (3, 1, 2)
    assert ids != (3, 1)
    assert ids != token_ids([3, 1, 4])
    assert ids != [3, 1, 2], "as for a tuple"
    assert {ids: "found"}[(3, 1, 2)] == "found"
    assert ids + token_ids([7]) == (3, 1, 2, 7)
    assert not token_ids([])
    assert token_ids(ids) is ids
    assert pickle.loads(pickle.dumps(ids)) == copy.deepcopy(ids) == ids
    assert [type(value) for value in (ids[0], next(iter(ids)), logprobs([-1.0])[0])] == [int, int, float]


def test_numbers_are_read_only_and_of_one_type():
    array = np.array([1, 2])
    ids = Numbers(array, int)
    with pytest.raises(ValueError, match="read-only"):
        ids.array[0] = 5
    array[0] = 5  # the owner's own
    with pytest.raises(AssertionError, match="expected float64, got int64"):
        Numbers(np.array([1, 2]), float)


@pytest.mark.parametrize("values", [[1.9], [2**63], [-1, 2**63], [2**70], ["7"], [None], [1, None], [[1, 2]], [True]])
def test_what_is_no_id_is_refused_instead_of_changed(values):
    with pytest.raises(ValueError, match=r"expected ids in the range of int64, got \["):
        token_ids(values)


@pytest.mark.parametrize("values", [[None], [-0.5, None], ["-0.5"], [[-0.5]]])
def test_what_is_no_logprob_is_refused_instead_of_changed(values):
    with pytest.raises(ValueError, match=r"expected floats, got \["):
        logprobs(values)


def test_whole_numbers_are_logprobs_and_any_iterable_will_do():
    assert logprobs([0, -1]) == (0.0, -1.0)
    assert logprobs([0, -1]).array.dtype == np.float64
    assert logprobs(iter([-0.5, 0])) == (-0.5, 0.0)
    assert token_ids(iter([-(2**63), 2**63 - 1])) == (-(2**63), 2**63 - 1)


def test_a_rollout_holds_arrays_however_it_was_made():
    exact = (-0.10000000149011612, -1 / 3, -5e-324)
    rollout = Rollout(0, 0, (1, 2), (4, 5, 6), exact, "stop", 7)
    changed = replace(rollout, response_ids=[4, 5, 6], rollout_logprobs=list(exact))
    assert changed == rollout
    assert hash(changed) == hash(rollout)
    assert isinstance(changed.response_ids, Numbers)
    assert rollout.prompt_ids.array.dtype == np.int64
    assert json.dumps(rollout.rollout_logprobs.array.tolist()) == json.dumps(exact), "no bit is lost"
