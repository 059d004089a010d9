"""Packs from a stream of samples: StreamingPacker plans, PackStream carries the samples along."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import islice
from typing import Any, get_args

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from nova_kernels.backend import choose
from nova_kernels.packing import native, reference
from nova_kernels.packing.batch import pack_samples
from nova_kernels.packing.plan import Overlong
from nova_kernels.varlen import MAX_TOKENS

COUNTS = ("read", "dropped", "truncated", "lost_tokens")


class StreamingPacker:
    """Packs of at most `capacity` tokens from lengths that arrive one by one; at most `window` samples wait.

    When `window` samples wait, the oldest and those that fill its pack best are closed as one pack; the others stay for
    the next one. So a sample waits while at most `window` packs are closed, and nothing is padded but the end of the
    stream. Samples are numbered 0, 1, ... as they arrive. The packs are a function of the lengths and their order.
    """

    def __init__(self, capacity: int, window: int = 1024, *, backend: str | None = None) -> None:
        """An empty packer.

        Args:
            capacity: tokens per pack.
            window: samples that wait, at least 1; more find fuller packs, up to some hundreds.
            backend: "native" (C++) or "reference"; None takes the first that can run.

        Raises:
            ValueError: capacity or window out of range.
        """
        if not 1 <= capacity <= MAX_TOKENS:
            raise ValueError(f"StreamingPacker: capacity must be 1 ... {MAX_TOKENS} tokens, got {capacity}")
        if not 1 <= window <= MAX_TOKENS:
            raise ValueError(f"StreamingPacker: window must be 1 ... {MAX_TOKENS} samples, got {window}")
        self.capacity, self.window = capacity, window
        self._backend = choose("StreamingPacker", backend, {"native": native.why_not(capacity), "reference": None})
        self._stream = {"native": native, "reference": reference}[self._backend].Stream(capacity, window)

    def push(self, length: int) -> list[np.ndarray]:
        """One more sample of `length` tokens; the pack that closes, if one does: numbers of its samples, int64.

        Raises:
            ValueError: not an integer of 1 ... capacity; the packer is as it was before.
        """
        return self.push_many([length])

    def push_many(self, lengths: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """As many pushes; the packs that close, in order.

        Raises:
            ValueError: a length that is not an integer of 1 ... capacity; the packer is as it was before.
        """
        sizes = np.asarray(lengths)
        if sizes.size == 0:
            return []
        if sizes.ndim != 1 or sizes.dtype.kind not in "iu":
            raise ValueError(f"StreamingPacker: expected integer lengths [N], got {sizes.dtype} {list(sizes.shape)}")
        wrong = np.flatnonzero((sizes < 1) | (sizes > self.capacity))
        if wrong.size:
            raise ValueError(
                f"StreamingPacker: sample {self.pushed + int(wrong[0])} has {sizes[wrong[0]]} tokens, expected 1 ... "
                f"{self.capacity}; leave it out or cut it"
            )
        return self._stream.push(np.ascontiguousarray(sizes, dtype=np.int64))

    def close(self) -> np.ndarray:
        """The next pack, however few samples wait.

        Raises:
            ValueError: none waits.
        """
        if not len(self):
            raise ValueError("StreamingPacker.close: no samples wait")
        return self._stream.close()

    def flush(self) -> list[np.ndarray]:
        """The packs of all samples that still wait; the last ones may be far from full."""
        packs = []
        while len(self):
            packs.append(self._stream.close())
        return packs

    def __len__(self) -> int:
        """Samples that wait."""
        return len(self._stream)

    @property
    def pushed(self) -> int:
        """Samples that have come so far; the next one gets this number."""
        return self._stream.pushed()

    def state_dict(self) -> dict[str, Any]:
        """Plain integers: what waits, and how many samples have come."""
        numbers, lengths = self._stream.waiting()
        return {
            "capacity": self.capacity,
            "window": self.window,
            "pushed": self.pushed,
            "waiting": numbers.tolist(),
            "lengths": lengths.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken; the packs that follow are the same.

        Raises:
            ValueError: it was taken from another capacity or window, or is damaged; the packer is as it was before.
        """
        if (state["capacity"], state["window"]) != (self.capacity, self.window):
            raise ValueError(
                f"StreamingPacker: the state is of capacity {state['capacity']} and window {state['window']}, this "
                f"packer has {self.capacity} and {self.window}"
            )
        numbers, lengths = (np.array(state[name], dtype=np.int64) for name in ("waiting", "lengths"))
        if numbers.ndim != 1 or numbers.shape != lengths.shape or numbers.size >= self.window:
            raise ValueError(
                f"StreamingPacker: a state with {numbers.shape} samples and {lengths.shape} lengths waiting"
            )
        if lengths.size and not 1 <= lengths.min() <= lengths.max() <= self.capacity:
            raise ValueError(f"StreamingPacker: a state with lengths {lengths.min()} ... {lengths.max()}")
        self._stream.restore(numbers, lengths, int(state["pushed"]))

    def __getstate__(self) -> dict[str, Any]:
        return {"backend": self._backend, **self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["capacity"], state["window"], backend=state["backend"])  # type: ignore[misc]
        self.load_state_dict(state)


class PackStream(IterableDataset):
    """Packed batches from an iterable of samples: for a plain loop, or a DataLoader with batch_size=None.

    The state holds the samples that wait and the position of the source: its own state where it has state_dict and
    load_state_dict, otherwise the number of samples read, which are read again and skipped on resume. In a DataLoader
    with workers the stream that moves is the worker's copy: save its state with a loader that asks the workers, as
    torchdata's StatefulDataLoader does.
    """

    def __init__(
        self,
        source: Iterable[Mapping[str, Any]],
        capacity: int,
        window: int = 1024,
        *,
        overlong: Overlong = "error",
        collate: Callable[[list[Mapping[str, Any]]], Any] = pack_samples,
    ) -> None:
        """Nothing is read yet.

        Args:
            source: samples as `pack_samples` takes them, in the same order whenever it is iterated; those of this rank
                only. In a DataLoader with several workers it must have a state of its own and split itself among the
                workers, as the iterable sets of Hugging Face's datasets do.
            capacity: tokens per pack.
            window: samples that wait, as in StreamingPacker.
            overlong: a longer sample is an error, is cut to the capacity in every field, or is left out.
            collate: a list of samples -> what is handed out: `pack_samples`, or a PackCollator.
        """
        super().__init__()
        if overlong not in get_args(Overlong):
            raise ValueError(f"PackStream: overlong must be one of {list(get_args(Overlong))}, got {overlong!r}")
        self._source: Any = source
        self._overlong, self._collate = overlong, collate
        state_dict = getattr(source, "state_dict", None)
        self._source_start = None if state_dict is None else deepcopy(state_dict())
        self._packer = StreamingPacker(capacity, window)
        self._waiting: dict[int, Mapping[str, Any]] = {}
        self._counts = dict.fromkeys(COUNTS, 0)
        self._exhausted = False
        self._loaded_by: int | None = None  # the process that loaded the state of the next pass

    @property
    def counts(self) -> dict[str, int]:
        """Samples read, dropped and truncated so far in this pass, and the tokens lost by the latter two."""
        return dict(self._counts)

    def __iter__(self) -> Iterator[Any]:
        """One pass over the source, or the rest of it after load_state_dict."""
        keeps_state = hasattr(self._source, "load_state_dict")
        workers = get_worker_info()
        if workers is not None and workers.num_workers > 1 and not keeps_state:
            raise ValueError(
                f"PackStream: {workers.num_workers} workers would each read the whole source; use one worker, or a "
                "source with state_dict and load_state_dict that splits itself"
            )
        if self._loaded_by not in (None, os.getpid()):
            raise ValueError(
                "PackStream: the state was loaded in another process than the one that reads; use num_workers=0, or a "
                "loader that loads it in its workers, as torchdata's StatefulDataLoader does"
            )
        if self._loaded_by is None:
            if keeps_state:  # a state that was loaded into the source may hold for all of its passes
                self._source.load_state_dict(deepcopy(self._source_start))
            self._packer, self._waiting = StreamingPacker(self._packer.capacity, self._packer.window), {}
            self._counts = dict.fromkeys(COUNTS, 0)
            self._exhausted = False
        self._loaded_by = None
        rest = islice(self._source, 0 if keeps_state else self._counts["read"], None)
        for sample in () if self._exhausted else rest:
            self._counts["read"] += 1
            length = len(sample["input_ids"])
            if length == 0:
                raise ValueError(
                    f"PackStream: sample {self._counts['read'] - 1} has no tokens; leave empty samples out"
                )
            if length > self._packer.capacity:
                if (fitting := self._shortened(sample, length)) is None:
                    continue
                sample, length = fitting, self._packer.capacity
            self._waiting[self._packer.pushed] = sample
            for pack in self._packer.push(length):
                yield self._batch(pack)
        self._exhausted = True
        while len(self._packer):
            yield self._batch(self._packer.close())

    def state_dict(self) -> dict[str, Any]:
        """Packer, waiting samples, counts and the source's state; the batches handed out so far are done with."""
        source = self._source.state_dict() if hasattr(self._source, "state_dict") else None
        packer = self._packer.state_dict()
        waiting = [self._waiting[number] for number in packer["waiting"]]
        counts, exhausted = self.counts, self._exhausted
        return {"packer": packer, "waiting": waiting, "counts": counts, "source": source, "exhausted": exhausted}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken, at the next iteration.

        Raises:
            ValueError: it was taken with another capacity or window.
        """
        self._packer.load_state_dict(state["packer"])
        self._waiting = dict(zip(state["packer"]["waiting"], state["waiting"], strict=True))
        self._counts = dict(state["counts"])
        self._exhausted = state["exhausted"]
        if hasattr(self._source, "load_state_dict"):
            self._source.load_state_dict(state["source"])
        self._loaded_by = os.getpid()

    def _batch(self, pack: np.ndarray) -> Any:
        return self._collate([self._waiting.pop(number) for number in pack.tolist()])

    def _shortened(self, sample: Mapping[str, Any], length: int) -> Mapping[str, Any] | None:
        capacity = self._packer.capacity
        if self._overlong == "error":
            raise ValueError(
                f"PackStream: sample {self._counts['read'] - 1} has {length} tokens, capacity is {capacity}; raise the "
                "capacity or pass overlong='truncate' or 'drop'"
            )
        cut = self._overlong == "truncate"
        self._counts["truncated" if cut else "dropped"] += 1
        self._counts["lost_tokens"] += length - capacity if cut else length
        return {name: values[:capacity] for name, values in sample.items()} if cut else None
