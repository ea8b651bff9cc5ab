import pytest
import torch

from aadl.flat import CPU_PIECE, FlatRow


def gather(row, tensors):
    """The row of `tensors`, filled piece by piece."""
    flat = torch.full((row.numel,), float("nan"), dtype=row.dtype)
    for part, value in row.read(tensors):
        assert value.shape == (part.stop - part.start,) and value.numel() <= row.piece
        flat[part].copy_(value)
    return flat


def round_trip(row, source, target):
    """Read `source` into a row and write the row into `target`."""
    row.write(row.views(gather(row, source)), target)


def numbers(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype)


CASES = {
    "plain": lambda: [numbers(3, 4), numbers(5)],
    "scalar": lambda: [numbers(), numbers(2), numbers()],
    "empty": lambda: [numbers(0), numbers(3), numbers(2, 0, 4), numbers(4)],
    "only empty": lambda: [numbers(0), numbers(3, 0)],
    "float64": lambda: [numbers(3, 4, dtype=torch.float64)],
    "complex": lambda: [numbers(3, 4, dtype=torch.complex64), numbers(5, dtype=torch.complex64)],
    "complex channels_last": lambda: [numbers(2, 3, 4, 5, dtype=torch.complex64).to(memory_format=torch.channels_last)],
    "channels_last": lambda: [numbers(2, 3, 4, 5).to(memory_format=torch.channels_last), numbers(7)],
    "channels_last_3d": lambda: [numbers(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d)],
    "transposed": lambda: [numbers(4, 6).T, numbers(3, 4, 5).permute(2, 0, 1)],
    "strided slice": lambda: [numbers(8, 6)[::2, 1::3], numbers(9)[::3]],
    "strided large": lambda: [numbers(2 * CPU_PIECE + 6)[::2], numbers(300, 600).T[::2]],
    "large": lambda: [numbers(2 * CPU_PIECE + 3)],
    "one piece": lambda: [numbers(CPU_PIECE)],
    "piece and one": lambda: [numbers(CPU_PIECE), numbers(1)],
    "large between small": lambda: [numbers(5), numbers(CPU_PIECE + 1), numbers(3), numbers(0), numbers(4)],
    "large twice": lambda: [numbers(CPU_PIECE + 1), numbers(0), numbers(3 * CPU_PIECE)],
    "runs of small": lambda: [numbers(CPU_PIECE // 4 + i) for i in range(9)],
    "many tiny": lambda: [numbers(i % 3) for i in range(50)],
}


def numel(tensors):
    return sum(t.numel() * (2 if t.is_complex() else 1) for t in tensors)


@pytest.mark.parametrize("case", CASES)
def test_a_row_takes_and_gives_back_every_element(case):
    tensors = CASES[case]()
    row = FlatRow(tensors)
    flat = gather(row, tensors)
    assert row.numel == flat.numel() == numel(tensors) and not flat.isnan().any()
    targets = [torch.full_like(t, -7) for t in tensors]
    round_trip(row, tensors, targets)
    for target, tensor in zip(targets, tensors, strict=True):
        assert torch.equal(target, tensor)
    values = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    expected = torch.cat([value.reshape(-1) for value in values]).sort().values
    assert torch.equal(flat.sort().values, expected)


@pytest.mark.parametrize("case", CASES)
def test_pieces_cover_the_row_once(case):
    tensors = CASES[case]()
    row = FlatRow(tensors)
    for parts in ([part for part, _ in row.read(tensors)], list(row.ranges())):
        assert [part.start for part in parts] == [0, *(part.stop for part in parts)][: len(parts)]
        assert (parts[-1].stop if parts else 0) == row.numel
        assert all(0 < part.stop - part.start <= CPU_PIECE for part in parts)


def test_writing_into_strided_targets_leaves_their_gaps_alone():
    storage = numbers(8, 6)
    before, view = storage.clone(), storage[::2, 1::3]
    row = FlatRow([view])
    row.write(row.views(torch.ones(row.numel)), [view])
    assert (view == 1).all()
    assert torch.equal(storage[1::2], before[1::2]) and torch.equal(storage[:, 0], before[:, 0])


def test_an_expanded_tensor_is_read_and_refused_for_writing():
    tensor = numbers(1, 4).expand(3, 4)
    row = FlatRow([tensor])
    assert torch.equal(gather(row, [tensor]).sort().values, tensor.reshape(-1).sort().values)
    with pytest.raises(RuntimeError, match="single memory location"):
        row.write(row.views(torch.arange(12.0)), [tensor])


def test_parameters_that_require_gradients_are_read_without_a_graph():
    parameter = torch.nn.Parameter(numbers(3))
    row = FlatRow([parameter])
    assert not any(value.requires_grad for _, value in row.read([parameter]))
    with torch.no_grad():
        row.write(row.views(torch.ones(3)), [parameter])
    assert parameter.tolist() == [1, 1, 1] and parameter.is_leaf


@pytest.mark.parametrize(
    "tensor",
    [
        numbers(40),
        numbers(3, 4, 5),
        numbers(2, 3, 4, 5).to(memory_format=torch.channels_last),
        numbers(4, 6).T,
        numbers(3, 4, dtype=torch.complex64),
        numbers(CPU_PIECE + 10),
    ],
    ids=["vector", "contiguous", "channels_last", "transposed", "complex", "large"],
)
def test_a_dense_tensor_is_read_where_it_lies(tensor):
    row = FlatRow([tensor])
    start, size = tensor.data_ptr(), row.dtype.itemsize
    for part, value in row.read([tensor]):
        assert value.data_ptr() == start + size * part.start and value.is_contiguous()


def test_only_runs_of_small_tensors_are_copied_together():
    small, large = [numbers(3), numbers(4)], numbers(CPU_PIECE)
    tensors = [*small, large]
    values = [value.data_ptr() for _, value in FlatRow(tensors).read(tensors)]
    assert len(values) == 2 and values[1] == large.data_ptr() and values[0] != small[0].data_ptr()


@pytest.mark.parametrize("first", ["contiguous", "channels_last"])
def test_strides_that_change_later_keep_the_order_of_the_row(first):
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    second = next(name for name in formats if name != first)
    tensor = numbers(2, 3, 4, 5)
    row = FlatRow([tensor.to(memory_format=formats[first])])
    before = gather(row, [tensor.to(memory_format=formats[first])])
    assert torch.equal(gather(row, [tensor.to(memory_format=formats[second])]), before)
    target = torch.zeros_like(tensor).to(memory_format=formats[second])
    row.write(row.views(before), [target])
    assert torch.equal(target, tensor) and target.is_contiguous(memory_format=formats[second])
    other = gather(FlatRow([tensor.to(memory_format=formats[second])]), [tensor])
    assert not torch.equal(other, before)  # a row laid out for the other format has another order


def test_none_is_read_as_zeros_and_passed_over_in_writing():
    tensors = [numbers(3), numbers(2, 2), numbers(CPU_PIECE + 1)]
    row = FlatRow(tensors)
    holes = [tensors[0], None, None]
    flat = gather(row, holes)
    assert torch.equal(flat[:3], tensors[0]) and not flat[3:].any()
    kept = [t.clone() for t in tensors]
    row.write(row.views(torch.ones(row.numel)), [None, tensors[1], None])
    assert (tensors[1] == 1).all()
    assert torch.equal(tensors[0], kept[0]) and torch.equal(tensors[2], kept[2])
    row.write(row.views(torch.ones(row.numel)), [None, None, None])
