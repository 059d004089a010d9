"""Rows: samples side by side, whatever they come in; both backends write the same bytes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_kernels.backend import native_extension
from nova_kernels.packing import PackCollator, PackedBatch, Ragged, pack_samples
from test_packing import BACKENDS, NATIVE

INTEGERS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64"]


def same(a: PackedBatch, b: PackedBatch) -> None:
    for name in ("input_ids", "labels", "position_ids", "cu_seqlens"):
        mine, other = getattr(a, name), getattr(b, name)
        assert mine.dtype == other.dtype and torch.equal(mine, other), name
    assert (a.max_seqlen, a.padding, a.extra.keys()) == (b.max_seqlen, b.padding, b.extra.keys())
    for name, row in a.extra.items():
        assert row.dtype == b.extra[name].dtype and torch.equal(row, b.extra[name]), name


@st.composite
def ragged_samples(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Samples of any integer type as array, tensor or list, with or without labels and a further field."""
    has_labels, has_extra = draw(st.booleans()), draw(st.booleans())
    samples: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(0, 6))):
        length = draw(st.integers(1, 9))
        ids = np.array(draw(st.lists(st.integers(0, 127), min_size=length, max_size=length)))
        sample = {"input_ids": ids.astype(draw(st.sampled_from(INTEGERS)))}
        if has_labels:
            sample["labels"] = (ids - 100).astype("int64")
        if has_extra:
            sample["advantage"] = np.linspace(0, 1, length, dtype=np.float32)
        if draw(st.booleans()):
            sample = {name: values.tolist() for name, values in sample.items() if name != "advantage"} | {
                name: values for name, values in sample.items() if name == "advantage"
            }
        elif sample["input_ids"].dtype.name not in ("uint16", "uint32") and draw(st.booleans()):
            sample = {name: torch.from_numpy(values) for name, values in sample.items()}
        samples.append(sample)
    return samples


@settings(max_examples=200, deadline=None, derandomize=True)
@given(samples=ragged_samples(), padding=st.integers(0, 5), multiple=st.sampled_from([None, 1, 8]))
def test_a_row_holds_the_samples_and_nothing_else(
    samples: list[dict[str, Any]], padding: int, multiple: int | None
) -> None:
    lengths = [len(sample["input_ids"]) for sample in samples]
    pad_to = sum(lengths) + padding if padding else None
    batches = [pack_samples(samples, pad_to=pad_to, pad_to_multiple_of=multiple, backend=b) for b in BACKENDS]
    batch = batches[0]
    assert batch.num_tokens == sum(lengths) + batch.padding and batch.num_samples == len(samples)
    bounds = batch.cu_seqlens.tolist()
    assert bounds == np.cumsum([0, *lengths, *([batch.padding] if batch.padding else [])]).tolist()
    for sample, start, end in zip(samples, bounds, bounds[1:], strict=False):
        assert batch.input_ids[0, start:end].tolist() == np.asarray(sample["input_ids"]).tolist()
        labels = np.asarray(sample.get("labels", sample["input_ids"])).tolist()
        assert batch.labels[0, start:end].tolist() == [-100, *labels[1:]]
        if "advantage" in sample:
            assert batch.extra["advantage"][0, start:end].tolist() == np.asarray(sample["advantage"]).tolist()
    assert batch.position_ids[0].tolist() == [p for a, b in pairwise(bounds) for p in range(b - a)]
    assert batch.max_seqlen == max((b - a for a, b in pairwise(bounds)), default=0)
    assert (batch.labels[0, sum(lengths) :] == -100).all() and (batch.input_ids[0, sum(lengths) :] == 0).all()
    for other in batches[1:]:
        same(batch, other)


def test_samples_lie_side_by_side_with_their_boundaries() -> None:
    batch = pack_samples([{"input_ids": [5, 6, 7]}, {"input_ids": np.array([8], np.int32)}, {"input_ids": [9, 4]}])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 4]]
    assert batch.labels.tolist() == [[-100, 6, 7, -100, -100, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6] and batch.cu_seqlens.dtype == torch.int32
    assert batch.seq_idx().tolist() == [[0, 0, 0, 1, 2, 2]] and batch.seq_idx().dtype == torch.int32
    assert (batch.max_seqlen, batch.num_tokens, batch.num_samples) == (3, 6, 3)
    assert {row.dtype for row in (batch.input_ids, batch.labels, batch.position_ids)} == {torch.int64}


@pytest.mark.parametrize("name", BACKENDS)
def test_labels_and_further_fields_travel_along(name: str) -> None:
    samples = [
        {"advantage": np.array([1.5, 2.5]), "input_ids": [1, 2], "labels": [9, 2], "turn": torch.tensor([0, 1])},
        {"input_ids": [3], "labels": [3], "advantage": np.array([3.5]), "turn": [7]},
    ]
    batch = pack_samples(samples, pad_to=5, backend=name)
    assert batch.labels.tolist() == [[-100, 2, -100, -100, -100]]
    assert batch.extra["advantage"].tolist() == [[1.5, 2.5, 3.5, 0.0, 0.0]]
    assert batch.extra["advantage"].dtype == torch.float64
    assert batch.extra["turn"].tolist() == [[0, 1, 7, 0, 0]]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn],
    ids=str,
)
def test_further_fields_keep_their_type(dtype: torch.dtype, name: str) -> None:
    values = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).to(dtype)
    samples = [{"input_ids": [1, 2], "top": values[:2]}, {"input_ids": [3], "top": values[2:]}]
    fields = {field: [sample[field] for sample in samples] for field in samples[0]}
    assert torch.equal(pack_samples(fields, backend=name).extra["top"].float()[0], values.float())
    row = pack_samples(samples, pad_to=4, backend=name).extra["top"]
    assert row.dtype == dtype and row.shape == (1, 4, 2)
    assert torch.equal(row.float()[0], torch.cat([values.float(), torch.zeros(1, 2)]))


@pytest.mark.parametrize("name", BACKENDS)
def test_bytes_in_another_order_or_place_are_read_all_the_same(name: str) -> None:
    """Big-endian files, and arrays that begin at an odd address."""
    odd = np.frombuffer(b"x" + np.array([1, 2, 3], "<i8").tobytes(), dtype="<i8", offset=1, count=3)
    assert not odd.flags.aligned
    for ids in (np.array([1, 2, 3], ">i8"), np.array([1, 2, 3], ">u2"), odd):
        batch = pack_samples([{"input_ids": ids, "labels": ids, "x": ids}], backend=name)
        assert batch.input_ids.tolist() == batch.extra["x"].tolist() == [[1, 2, 3]]
        assert batch.labels.tolist() == [[-100, 2, 3]]


@pytest.mark.parametrize("name", BACKENDS)
def test_further_fields_are_numbers_of_this_machine(name: str) -> None:
    swapped = np.array([0.5, 1.5], ">f4")
    for samples in ([{"input_ids": [1, 2], "w": swapped}], {"input_ids": [[1, 2]], "w": Ragged(swapped, [0, 2])}):
        row = pack_samples(samples, backend=name).extra["w"]
        assert row.dtype == torch.float32 and row.tolist() == [[0.5, 1.5]]
    dates = np.array(["2020-01-01", "2020-01-02"], "datetime64[D]")
    for samples in ([{"input_ids": [1, 2], "w": dates}], {"input_ids": [[1, 2]], "w": Ragged(dates, [0, 2])}):
        with pytest.raises(ValueError, match=r"expected numbers in w, got datetime64"):
            pack_samples(samples, backend=name)
    arrow = {"input_ids": pa.array([[1, 2]]), "w": pa.array([[0.5, 1.5]])}  # read-only memory
    assert pack_samples(arrow, backend=name).extra["w"].tolist() == [[0.5, 1.5]]


@pytest.mark.parametrize("name", BACKENDS)
def test_types_that_numpy_lacks_are_not_mistaken_for_their_bits(name: str) -> None:
    low = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    samples = [{"input_ids": [1, 2], "x": torch.ones(2)}, {"input_ids": [1, 2], "x": low}]
    for mixed in (samples, samples[::-1]):
        with pytest.raises(ValueError, match=r"x mixes tensors of torch.bfloat16 with other types"):
            pack_samples(mixed, backend=name)
    for field in ("input_ids", "labels"):
        with pytest.raises(ValueError, match=rf"expected integer {field}, got torch.bfloat16"):
            pack_samples([{"input_ids": [1, 2]} | {field: low}], backend=name)
    assert pack_samples(samples, index=[1], backend=name).extra["x"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", BACKENDS)
def test_lists_of_numbers_are_what_numpy_makes_of_them(name: str) -> None:
    for values in ([True, False, True], [1, 2, 3], [0.5, 1.0, 2.0], [1, 0.5, True], [2**62, -5, 0], [True, 2, 0.5]):
        row = pack_samples([{"input_ids": [1, 2, 3], "x": values}], backend=name).extra["x"]
        expected = torch.from_numpy(np.asarray(values))
        assert row.dtype == expected.dtype and torch.equal(row[0], expected)
    with pytest.raises(ValueError, match=r"expected integer input_ids, got bool"):
        pack_samples([{"input_ids": [True, False]}], backend=name)


def test_fields_of_mixed_types_take_the_wider_one() -> None:
    samples = [{"input_ids": [1], "x": np.array([1], np.int32)}, {"input_ids": [2], "x": np.array([0.5], np.float32)}]
    assert pack_samples(samples).extra["x"].tolist() == [[1.0, 0.5]]


def test_padding_is_one_segment() -> None:
    batch = pack_samples([{"input_ids": [1, 2]}, {"input_ids": [3]}], pad_to=9)
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 9]
    assert batch.position_ids.tolist() == [[0, 1, 0, 0, 1, 2, 3, 4, 5]]
    assert batch.labels.tolist() == [[-100, 2] + [-100] * 7]
    assert (batch.num_samples, batch.max_seqlen, batch.padding) == (2, 6, 6)


def test_padding_to_a_multiple_adds_less_than_one() -> None:
    assert pack_samples([{"input_ids": [1, 2, 3]}], pad_to_multiple_of=8).padding == 5
    assert pack_samples([{"input_ids": [1] * 8}], pad_to_multiple_of=8).padding == 0
    assert pack_samples([{"input_ids": [1] * 3}], pad_to=9, pad_to_multiple_of=8).num_tokens == 16


@pytest.mark.parametrize("name", BACKENDS)
def test_the_caller_keeps_its_arrays(name: str) -> None:
    ids = np.array([4, 5], dtype=np.int64)
    labels = ids.copy()
    batch = pack_samples([{"input_ids": ids, "labels": labels}], backend=name)
    batch.input_ids.fill_(0)
    assert ids.tolist() == labels.tolist() == [4, 5]


@pytest.mark.parametrize("name", BACKENDS)
def test_rows_are_written_into_the_callers_buffers(name: str) -> None:
    out = {field: torch.full((1, 8), 7) for field in ("input_ids", "labels", "position_ids")}
    out["x"] = torch.full((1, 8, 2), 7.0)
    samples = [{"input_ids": [1, 2], "x": np.ones((2, 2), np.float32)}, {"input_ids": [3], "x": np.ones((1, 2), "f4")}]
    batch = pack_samples(samples, pad_to=5, out=out, backend=name)
    same(batch, pack_samples(samples, pad_to=5, backend=name))
    for field in ("input_ids", "labels", "position_ids"):
        assert getattr(batch, field).data_ptr() == out[field].data_ptr() and (out[field][0, 5:] == 7).all()
    assert batch.extra["x"].data_ptr() == out["x"].data_ptr() and (out["x"][0, 5:] == 7).all()


@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        pytest.param({"labels": torch.zeros(1, 2, dtype=torch.int64)}, r"expected out\['labels'\] .*>= 3", id="small"),
        pytest.param({"labels": torch.zeros(1, 9)}, r"torch.int64 .*got torch.float32", id="type"),
        pytest.param({"labels": torch.zeros(9, dtype=torch.int64)}, r"got torch.int64 \[9\]", id="shape"),
        pytest.param({"labels": torch.zeros(2, 9, dtype=torch.int64)}, r"got torch.int64 \[2, 9\]", id="rows"),
        pytest.param({"labels": torch.zeros(1, 9, dtype=torch.int64)[:, ::2]}, r"contiguous", id="strided"),
        pytest.param({"labels": torch.zeros(1, 9, dtype=torch.int64, device="meta")}, r"on meta", id="device"),
        pytest.param({"label": torch.zeros(1, 9)}, r"out has \['label'\], the batch has only", id="unknown"),
    ],
)
def test_wrong_buffers_are_refused(buffer: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_samples([{"input_ids": [1, 2, 3]}], out=buffer)


def test_fields_lie_in_one_flat_array() -> None:
    values, offsets = np.arange(10, dtype=np.int32), [0, 3, 4, 10]
    ids = Ragged(values, offsets)
    assert len(ids) == 3 and ids.lengths.tolist() == [3, 1, 6] and ids.take([1])[0].base is not None
    row = pack_samples({"input_ids": ids, "labels": Ragged(values, offsets)}, index=[2, 0])
    assert row.input_ids.tolist() == [[4, 5, 6, 7, 8, 9, 0, 1, 2]]
    assert row.labels.tolist() == [[-100, 5, 6, 7, 8, 9, -100, 1, 2]]


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list], ids=["list", "large-list"])
def test_arrow_columns_are_read_where_they_lie(kind: Any) -> None:
    array = pa.array([[1, 2], [3], [4, 5, 6]], kind(pa.int32()))
    ragged = Ragged.from_arrow(array)
    address = array.values.buffers()[1].address
    assert ragged.values.__array_interface__["data"][0] == address
    assert [v.tolist() for v in Ragged.from_arrow(array[1:]).take([0, 1])] == [[3], [4, 5, 6]]
    table = pa.chunked_array([array, array[:1]])
    with pytest.raises(ValueError, match=r"input_ids is an Arrow column of 2 chunks, .*join them once with Ragged"):
        pack_samples({"input_ids": table}, index=[3, 1])
    assert pack_samples({"input_ids": Ragged.from_arrow(table)}, index=[3, 1]).input_ids.tolist() == [[1, 2, 3]]
    hole = pa.array([None, [1, 2], [None], [3]], kind(pa.int32()))
    assert [v.tolist() for v in Ragged.from_arrow(hole[1:2]).take([0])] == [[1, 2]]
    assert pack_samples({"input_ids": array}).cu_seqlens.tolist() == [0, 2, 3, 6]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: Ragged([1, 2], [0, 3]), r"offsets go from 0 to 3, values are \[2\]", id="outside"),
        pytest.param(lambda: Ragged([1, 2], [0, 2, 1, 2]), r"sample 1 ends before it starts", id="decreasing"),
        pytest.param(lambda: Ragged([1, 2], [0.0, 2.0]), r"expected integer offsets", id="float"),
        pytest.param(
            lambda: Ragged.from_arrow(pa.array([1, 2])), r"expected a list or large_list array, got int64", id="flat"
        ),
        pytest.param(
            lambda: Ragged.from_arrow(pa.array([[1], [2]], pa.list_view(pa.int64()))), r"got list_view<", id="list-view"
        ),
        pytest.param(
            lambda: Ragged.from_arrow(pa.array([[1], [2]], pa.list_(pa.int64(), 1))),
            r"got fixed_size_list<",
            id="fixed",
        ),
        pytest.param(lambda: Ragged.from_arrow(pa.array([[1], None])), r"1 values are missing", id="missing"),
        pytest.param(lambda: Ragged.from_arrow(pa.array([[1], [None]])), r"1 values are missing", id="missing-token"),
    ],
)
def test_wrong_columns_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_sample_numbers_are_checked() -> None:
    ids = Ragged([1, 2], [0, 1, 2])
    for wrong in ([True, False], [0.9], [[0]]):
        with pytest.raises(ValueError, match=r"expected sample numbers \[N\], got"):
            pack_samples({"input_ids": ids}, index=wrong)  # type: ignore[arg-type]
    with pytest.raises(IndexError, match=r"-1 is not one of the 2 samples"):
        pack_samples({"input_ids": [[1], [2]]}, index=[0, -1])
    with pytest.raises(IndexError, match=r"-1 is not one of the 2 samples"):
        pack_samples([{"input_ids": [1]}, {"input_ids": [2]}], index=[-1])
    with pytest.raises(IndexError, match=r"2 is not one of the 2 samples"):
        PackCollator(fields={"input_ids": [[1], [2]]})([2])
    assert pack_samples({"input_ids": ids, "x": ids}, index=[]).num_tokens == 0
    for number in (2, -1):
        with pytest.raises(IndexError, match=rf"{number} is not one of the 2 samples"):
            pack_samples({"input_ids": ids}, index=[0, number])


def test_the_batch_moves_and_speaks_to_a_model() -> None:
    batch = pack_samples([{"input_ids": [1, 2]}]).to("meta")
    assert batch.input_ids.device.type == batch.labels.device.type == batch.position_ids.device.type == "meta"
    assert batch.cu_seqlens.device.type == "cpu"
    kwargs = batch.attention_kwargs()
    assert kwargs["cu_seq_lens_q"] is kwargs["cu_seq_lens_k"] is batch.cu_seqlens
    assert kwargs["max_length_q"] == 2 and kwargs["use_cache"] is False


@pytest.mark.parametrize("name", BACKENDS)
def test_no_samples_are_an_empty_row(name: str) -> None:
    batch = pack_samples([], backend=name)
    assert batch.input_ids.shape == batch.labels.shape == (1, 0)
    assert batch.cu_seqlens.tolist() == [0] and batch.max_seqlen == 0 and batch.num_samples == 0
    assert pack_samples([], pad_to=3, backend=name).cu_seqlens.tolist() == [0, 3]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        pytest.param([{"ids": [1]}], {}, r"sample 0 has no input_ids, only \['ids'\]", id="no-ids"),
        pytest.param({"ids": [[1]]}, {}, r"there are no input_ids, only \['ids'\]", id="no-ids-column"),
        pytest.param([{"input_ids": []}], {}, r"sample 0 has no tokens", id="no-tokens"),
        pytest.param([{"input_ids": [1, 2], "labels": [1]}], {}, r"expected labels \[2\].*got \[1\]", id="ragged"),
        pytest.param([{"input_ids": [[1, 2]]}], {}, r"expected input_ids of shape \[l\], got \[1, 2\]", id="2-D"),
        pytest.param([{"input_ids": 3}], {}, r"expected input_ids of shape \[l\], got \[\]", id="0-D"),
        pytest.param([{"input_ids": [0.5]}], {}, r"expected integer input_ids, got float64", id="float-ids"),
        pytest.param([{"input_ids": [1], "text": ["a"]}], {}, r"expected numbers in text, got <U1", id="text"),
        pytest.param(
            [{"input_ids": [1], "x": np.ones((1, 2))}, {"input_ids": [1], "x": np.ones((1, 3))}],
            {},
            r"sample 1: x is \[3\] per token, in sample 0 \[2\]",
            id="widths-differ",
        ),
        pytest.param(
            [{"input_ids": [1]}, {"input_ids": [1], "labels": [1]}],
            {},
            r"sample 1 has the fields \['input_ids', 'labels'\], sample 0 has \['input_ids'\]",
            id="fields-differ",
        ),
        pytest.param({"input_ids": [[1], [2]], "labels": [[1]]}, {}, r"different numbers of samples", id="columns"),
        pytest.param(
            [{"input_ids": [1], "attention_mask": [1]}], {}, r"attention_mask is computed from the lengths", id="mask"
        ),
        pytest.param([{"input_ids": [1, 2, 3]}], {"pad_to": 2}, r"3 tokens do not fit in pad_to=2", id="pad-to"),
        pytest.param([{"input_ids": [1]}], {"pad_to": 2**31}, r"2147483648 tokens do not fit in int32", id="int32"),
        pytest.param([{"input_ids": [1]}], {"pad_to_multiple_of": 0}, r"must be at least 1, got 0", id="multiple"),
    ],
)
def test_wrong_samples_are_refused(samples: Any, options: dict, message: str, name: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_samples(samples, **options, backend=name)


@pytest.mark.skipif(not NATIVE, reason="no C++ extension")
def test_the_extension_guards_its_memory() -> None:
    native = native_extension()
    ids = [np.arange(3)]
    rows = [np.zeros(3, np.int64) for _ in range(3)]
    bounds = np.zeros(2, np.int32)
    for arguments, message in [
        ((ids, None, *[row[:2] for row in rows], bounds), "must fit in the row"),
        ((ids, None, rows[0], rows[1][:2], rows[2], bounds), "outputs must be of one size"),
        ((ids, None, *rows, bounds[:1]), "one entry per segment"),
        ((ids, [np.arange(2)], *rows, bounds), "as long as input_ids"),
        (([np.arange(6)[::2]], None, *rows, bounds), "contiguous"),
        (([np.zeros(3)], None, *rows, bounds), "expected integers"),
    ]:
        with pytest.raises(ValueError, match=message):
            native.lay_out(*arguments)
    with pytest.raises(ValueError, match="must fit in the output"):
        native.concatenate(ids, np.zeros(2, np.int64))
    with pytest.raises(ValueError, match="of the output's type"):
        native.concatenate(ids, np.zeros(3))
