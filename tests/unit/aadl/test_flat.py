import pytest
import torch
from torch.overrides import TorchFunctionMode

from aadl.flat import CPU_PIECE, SAMPLE, SHORT_ROW, FlatRow


@pytest.fixture
def in_pieces(monkeypatch):
    """Rows longer than a piece are cut, however short they are."""
    monkeypatch.setattr("aadl.flat.SHORT_ROW", 0)


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


def real(tensor):
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def numel(tensors):
    return sum(real(t).numel() for t in tensors)


@pytest.mark.parametrize("short", [SHORT_ROW, 0], ids=["short rows whole", "in pieces"])
@pytest.mark.parametrize("case", CASES)
def test_a_row_takes_and_gives_back_every_element(case, short, monkeypatch):
    monkeypatch.setattr("aadl.flat.SHORT_ROW", short)
    tensors = CASES[case]()
    row = FlatRow(tensors)
    flat = gather(row, tensors)
    assert row.numel == flat.numel() == numel(tensors) and not flat.isnan().any()
    targets = [torch.full_like(t, -7) for t in tensors]
    round_trip(row, tensors, targets)
    for target, tensor in zip(targets, tensors, strict=True):
        assert torch.equal(target, tensor)
    expected = torch.cat([real(t).reshape(-1) for t in tensors]).sort().values
    assert torch.equal(flat.sort().values, expected)


@pytest.mark.parametrize(("size", "cut"), [(0, False), (3, False), (SHORT_ROW, False), (SHORT_ROW + 1, True)])
def test_short_rows_are_one_piece(size, cut):
    tensors = [numbers(size // 3), numbers(0), numbers(size - size // 3)]
    row = FlatRow(tensors)
    for parts in ([part for part, _ in row.read(tensors)], list(row.ranges())):
        assert (parts == [slice(0, size)]) == (size > 0 and not cut)
        assert all(part.stop - part.start <= CPU_PIECE for part in parts) == (cut or size < CPU_PIECE)
    assert [part.stop for part in FlatRow([numbers(10)]).ranges(4)] == [4, 8, 10]


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
@pytest.mark.usefixtures("in_pieces")
def test_a_dense_tensor_is_read_where_it_lies(tensor):
    row = FlatRow([tensor])
    start, size = tensor.data_ptr(), row.dtype.itemsize
    for part, value in row.read([tensor]):
        assert value.data_ptr() == start + size * part.start and value.is_contiguous()


@pytest.mark.usefixtures("in_pieces")
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


# ---- views that are kept -------------------------------------------------------------------------------------------


def rebind(tensors):
    """Other memory under the same tensor."""
    tensors[0].data = tensors[0].data + 1


def turn(tensors):
    """Other strides at the same address."""
    tensors[0].data = tensors[0].data.T


def scatter(tensors):
    """Other memory of which no flat view exists."""
    tensors[0].data = torch.stack([tensors[0].data + 1, numbers(4, 4)], -1)[..., 0]


def exchange(tensors):
    """Another tensor at the same place in the list."""
    tensors[0] = tensors[0].detach() + 1


@pytest.mark.parametrize("change", [rebind, turn, scatter, exchange])
@pytest.mark.parametrize("part", [(0, 1), (0, 2)], ids=["whole", "window"])
def test_views_follow_tensors_that_change_their_memory(change, part):
    tensors = [numbers(4, 4), numbers(5)]
    row = FlatRow(tensors, part)
    before, old = gather(row, tensors), tensors[0].detach()
    assert torch.equal(gather(row, tensors), before)  # the kept views
    change(tensors)
    fresh = FlatRow([numbers(4, 4), numbers(5)], part)  # keeps nothing
    now = gather(row, tensors)
    assert torch.equal(now, gather(fresh, tensors)) and not torch.equal(now, before)
    assert torch.equal(row.sample(tensors), fresh.sample(tensors))
    change(tensors)
    kept, values = old.clone(), torch.arange(21.0)
    row.write(row.views(values), tensors)
    assert torch.equal(tensors[0], values[:16].view(4, 4)) and torch.equal(tensors[1], values[16:])
    assert torch.equal(old, kept) != (change is turn)  # which turned the same memory


class Detached(TorchFunctionMode):
    """Counts the calls of `detach`, with which every view of a tensor begins."""

    num_calls = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.num_calls += function is torch.Tensor.detach
        return function(*args, **kwargs or {})


def test_views_are_kept_for_a_list_of_tensors_while_nothing_changes():
    tensors = [numbers(4, 4), numbers(5)]
    row = FlatRow(tensors)

    def makes_views(given):
        with Detached() as detached:
            result = gather(row, given)
        assert torch.equal(result, torch.cat([tensor.reshape(-1) for tensor in given]))
        return detached.num_calls > 0

    assert makes_views(tensors)
    tensors[0].add_(1)
    assert not makes_views(tensors)
    rebind(tensors)
    assert makes_views(tensors) and not makes_views(tensors)
    assert makes_views(list(tensors))


# ---- windows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("short", [SHORT_ROW, 0], ids=["short rows whole", "in pieces"])
@pytest.mark.parametrize("case", CASES)
def test_windows_laid_end_to_end_are_the_whole_row(case, short, monkeypatch):
    monkeypatch.setattr("aadl.flat.SHORT_ROW", short)
    tensors = CASES[case]()
    whole = gather(FlatRow(tensors), tensors)
    for count in (1, 2, 3, 7, 60):
        rows = [FlatRow(tensors, (index, count)) for index in range(count)]
        parts = [gather(row, tensors) for row in rows]
        assert torch.equal(torch.cat(parts), whole), count
        length = -(-whole.numel() // count)
        for row, part in zip(rows, parts, strict=True):
            assert row.whole == whole.numel() and row.window_length == length >= row.numel == part.numel(), count
            assert torch.equal(whole[row.window], part), count
            assert [piece.stop for piece, _ in row.read(tensors)][-1:] == [row.numel] * (row.numel > 0), count
        assert sum(row.numel for row in rows) == whole.numel(), count
        full = [row.numel == length for row in rows]
        assert full == sorted(full, reverse=True), count  # only the last ones are shorter, or empty


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("case", ["plain", "channels_last", "complex channels_last", "strided slice", "many tiny"])
def test_a_window_writes_whole_rows(case, index):
    tensors = CASES[case]()
    whole, row = gather(FlatRow(tensors), tensors), FlatRow(tensors, (index, 3))
    targets = [torch.zeros_like(t) for t in tensors]
    row.write(row.views(whole), targets)
    assert all(map(torch.equal, targets, tensors)) and row.numel < whole.numel()


# ---- samples and logical views -------------------------------------------------------------------------------------


def test_a_sample_holds_the_leading_elements_of_every_tensor():
    channels_last = numbers(2, 3, 4, 5).to(memory_format=torch.channels_last)
    tensors = [numbers(SAMPLE + 9), numbers(3), numbers(0), channels_last, None]
    row = FlatRow([*tensors[:4], numbers(7)])
    order = channels_last.permute(0, 2, 3, 1).reshape(-1)[:SAMPLE]  # that of the memory
    expected = [tensors[0][:SAMPLE], tensors[1], order, torch.zeros(7)]
    assert torch.equal(row.sample(tensors), torch.cat(expected))
    assert not torch.equal(channels_last.reshape(-1)[:SAMPLE], order)


def test_a_sample_of_a_window_is_of_the_elements_inside():
    tensors = [numbers(100), numbers(100), numbers(100)]
    first, second = (FlatRow(tensors, (index, 2)).sample(tensors) for index in range(2))
    assert torch.equal(first, torch.cat([tensors[0][:SAMPLE], tensors[1][:50]]))
    assert torch.equal(second, torch.cat([tensors[1][50:], tensors[2][:SAMPLE]]))


@pytest.mark.parametrize("case", CASES)
def test_logical_views_have_the_shapes_of_the_tensors(case):
    tensors = CASES[case]()
    row = FlatRow(tensors)
    flat = gather(row, tensors)
    rows = torch.stack([flat, 2 * flat])
    for tensor, view, views in zip(tensors, row.logical_views(flat), row.logical_views(rows), strict=True):
        assert torch.equal(view, real(tensor)) and torch.equal(views, torch.stack([real(tensor), 2 * real(tensor)]))
        assert view.shape == (*tensor.shape, *([2] if tensor.is_complex() else []))
        views.zero_()
    assert not rows.any() and flat.any() == (flat.numel() > 0)  # they share the memory of the rows
