"""What version counters say of writes, which writes come regularly, and how long a write is remembered."""

from aadl.outside import Change, OutsideWrites
from aadl.watch import is_regular, kind_of_write


def test_regular_writes_come_at_equal_distances():
    writes = {}
    gaps = {1: False, 2: False, 3: True, 4: True, 6: False, 8: True, 9: False, 10: True, 30: False, 31: False, 32: True}
    assert {gap: is_regular(writes, "4 in 4", gap, 5) for gap in gaps} == gaps
    assert not is_regular(writes, "8 in 4", 33, 5)
    assert set(writes) == {"4 in 4", "8 in 4"}
    is_regular(writes, "8 in 4", 38, 5)
    assert set(writes) == {"8 in 4"}  # the other one was too long ago
    assert [is_regular(writes, "1 in 1", gap, 5) for gap in (50, 55, 60)] == [False, False, True]
    assert kind_of_write([3, 4, 5], [3, 4, 5]) == "" and kind_of_write([3, 4, 5], [4, 4, 7]) == "3 in 2"


def restored(**saved):
    outside = OutsideWrites(10, with_momentum=False)
    outside.restore({"writes": {}, "unseen": "", "first": "", "written": False, "doubtful": False, **saved})
    return outside


def test_a_doubt_outlives_a_macro_step_while_a_candidate_may_be_taken_back():
    outside = restored(doubtful=True)
    outside.settle_doubt(on_trial=True)
    assert outside.is_doubtful
    outside.settle_doubt(on_trial=False)
    assert not outside.is_doubtful


def test_a_write_before_a_save_is_explained_once():
    outside = restored(unseen="4 in 4")
    assert outside.before_step(gap=7, in_macro_step=5, layout=None) is Change.RUNNING
    assert outside.before_step(gap=8, in_macro_step=6, layout=None) is Change.NONE


def test_a_forgotten_macro_step_leaves_no_write_to_be_explained():
    outside = restored(unseen="4 in 4", first="4 in 4", doubtful=True, written=True, leap=1.0)
    outside.forget()
    fresh = OutsideWrites(10, with_momentum=False)
    assert outside.state(None, None, has_values=True) == fresh.state(None, None, has_values=True)
