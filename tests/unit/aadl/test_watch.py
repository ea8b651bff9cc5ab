"""What version counters say of writes, and which writes come regularly."""

from aadl.watch import is_regular, kind_of_write


def test_regular_writes_come_at_equal_distances():
    writes = {}
    gaps = {1: False, 2: False, 3: True, 4: True, 6: False, 8: True, 9: False, 10: True, 30: False, 31: False, 32: True}
    assert {gap: is_regular(writes, "4 in 4", gap, 5) for gap in gaps} == gaps
    assert not is_regular(writes, "8 in 4", 33, 5)
    assert set(writes) == {"4 in 4", "8 in 4"}
    is_regular(writes, "8 in 4", 38, 5)
    assert set(writes) == {"8 in 4"}  # the other one was too long ago
    assert kind_of_write([3, 4, 5], [3, 4, 5]) == "" and kind_of_write([3, 4, 5], [4, 4, 7]) == "3 in 2"
