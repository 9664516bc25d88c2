"""A rank's batches as training takes them: decoded ahead, and on its device.

Loader processes live as long as the stage. Before the steps of a new placement they are sent its
readers, and until then they wait:

    training    readers of steps 0-99   batches 0-99   plans anew   readers of steps 100-199   ...
    loader      reads, decodes 0-99     waits                       reads, decodes 100-199

On a GPU the copies run on a stream of their own: while a step is computed, the next batch arrives.
They start from page-locked memory, so the host does not wait for them either.

Letters: B images of a step.
"""

import pickle
import queue
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from moce_dist.data.device import DeviceDecoder
from moce_dist.data.loaders import CONTEXT, in_shared_memory, load
from moce_dist.data.stream import (
    Batch,
    GroupOf,
    PlannedStream,
    Readers,
    StreamSpec,
    record_bad_image,
)

_CPU = torch.device("cpu")


class BatchStream(Iterator[Batch]):
    """A rank's batches from step `start` on, decoded ahead by `loader_processes`.

    Processes start with the first batch and live until `close`. Images, noise and weights lie on
    `device`.

    Raises:
        ConfigError: nothing is installed that decodes on a device.
    """

    def __init__(self, spec: StreamSpec, *, start: int, device: torch.device = _CPU) -> None:
        self._spec, self._step, self._stop = spec, start, start
        processes = spec.data.loader_processes
        on_device = spec.data.decode_on == "device"
        self._decoder = DeviceDecoder(spec.data.image_size, device) if on_device else None
        self._upload = Upload(device)
        self._inboxes = [_Inbox(is_shared=processes > 0) for _ in range(max(1, processes))]
        self._batches = load(
            PlannedStream(spec, start, self._inboxes),
            processes,
            stall_s=spec.data.stall_timeout_s,
            at_end=self._end,
            batch_size=None,
            prefetch_factor=spec.data.prefetch_batches if processes else None,
            pin_memory=device.type == "cuda",
        )

    def extend(self, group_of: GroupOf, stop: int) -> None:
        """Go on to step `stop`, its samples read by the groups that `group_of` says."""
        self._stop = stop
        for inbox in self._inboxes:
            inbox.put(Readers(stop, group_of))

    def __next__(self) -> Batch:
        """Return the next batch.

        Raises:
            StopIteration: nobody has said who reads the next one.
            OSError: shared memory is too small for the batches.
            RuntimeError: nothing came for `data.stall_timeout_s`, or a process died.
        """
        if self._step >= self._stop:
            raise StopIteration
        batch: Batch = next(self._batches)
        self._step += 1
        if self._decoder is not None:
            images = batch.images.to(self._decoder.device)
            if batch.waiting is not None:
                places = batch.waiting.places[:, :2].tolist()
                for (slot, sample_id), square in zip(
                    places, self._decoder.decode(batch.waiting), strict=True
                ):
                    if isinstance(square, Tensor):
                        images[slot] = square
                    else:
                        batch.weights[slot] = 0.0
                        record_bad_image(self._spec, batch.step, sample_id, str(square))
            batch = batch._replace(images=images, waiting=None)
        images, noise, weights = self._upload(batch.images, batch.noise, batch.weights)
        return batch._replace(images=images, noise=noise, weights=weights)

    def close(self) -> None:
        """End the loader processes."""
        self._end()
        self._batches.close()

    def _end(self) -> None:
        for inbox in self._inboxes:
            inbox.put(None)


class _Inbox(Iterable[Readers]):
    """What a loader process, or with none this one, hears of; None is the last it hears."""

    def __init__(self, *, is_shared: bool) -> None:
        self._is_shared = is_shared
        self._queue: Any = queue.SimpleQueue()
        if is_shared:
            with in_shared_memory():
                self._queue = CONTEXT.Queue()
            # a process that died takes nothing any more: nobody is to wait until it does
            self._queue.cancel_join_thread()

    def put(self, readers: Readers | None) -> None:
        """Send, without waiting for who receives.

        Raises:
            AttributeError, pickle.PicklingError: another process cannot be told of these readers.
        """
        # here, not in the queue's own thread, which would print the error and drop the message
        self._queue.put(pickle.dumps(readers) if self._is_shared else readers)

    def __iter__(self) -> Iterator[Readers]:
        return iter(self._receive, None)

    def _receive(self) -> Readers | None:
        message = self._queue.get()
        return pickle.loads(message) if self._is_shared else message  # noqa: S301 - from here


def stream(
    spec: StreamSpec,
    group_of: GroupOf,
    *,
    start: int,
    stop: int,
    device: torch.device = _CPU,
) -> Iterator[Batch]:
    """Yield this rank's batches of steps [start, stop) under one placement; see `BatchStream`."""
    batches = BatchStream(spec, start=start, device=device)
    batches.extend(group_of, stop)
    try:
        yield from batches
    finally:
        batches.close()


class Upload:
    """Brings tensors to a device; to a CPU they are there already."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Begin to copy; what is launched from now on waits for the copies, the host does not."""
        if self._stream is None:
            return tensors
        with torch.cuda.stream(self._stream):
            there = tuple(tensor.to(self._device, non_blocking=True) for tensor in tensors)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for tensor in there:
            # their memory is the other stream's: it must not be given away while they are in use
            tensor.record_stream(current)
        return there
