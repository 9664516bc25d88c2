"""A rank's batches as training uses them: decoded ahead, and on the rank's device.

Loader processes live as long as the stage. They wait until the training process sends them the
readers of the next steps, which a new placement determines:

    training    readers of steps 0-99   batches 0-99   plans anew   readers of steps 100-199   ...
    loader      reads, decodes 0-99     waits                       reads, decodes 100-199

On a GPU the copies run on their own CUDA stream, so the next batch is copied while a step is
computed. They read page-locked memory, so the host does not wait for them.
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
    """A rank's batches from step `start` on, decoded ahead by `loader_processes` processes.

    The processes start with the first batch and live until `close`. Images, noise and weights are
    on `device`.

    Raises:
        ConfigError: `data.decode_on` is `device`, but the decoder is not installed.
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
        """Continue up to step `stop`; `group_of` maps slots to the groups that read them."""
        self._stop = stop
        for inbox in self._inboxes:
            inbox.put(Readers(stop, group_of))

    def __next__(self) -> Batch:
        """Return the next batch.

        Raises:
            StopIteration: `extend` was not called for the next step.
            OSError: shared memory is too small for the batches.
            RuntimeError: no batch came for `data.stall_timeout_s`, or a process died.
        """
        if self._step >= self._stop:
            raise StopIteration
        batch: Batch = next(self._batches)
        self._step += 1
        if self._decoder is not None:
            with self._upload.stream():
                batch = self._decoded(batch, self._decoder)
        images, noise, weights = self._upload(batch.images, batch.noise, batch.weights)
        return batch._replace(images=images, noise=noise, weights=weights)

    def _decoded(self, batch: Batch, decoder: DeviceDecoder) -> Batch:
        images = batch.images.to(decoder.device, non_blocking=True)
        if batch.waiting is not None:
            places = batch.waiting.places[:, :2].tolist()
            squares = decoder.decode(batch.waiting)
            for (slot, sample_id), square in zip(places, squares, strict=True):
                if isinstance(square, Tensor):
                    images[slot] = square
                else:
                    batch.weights[slot] = 0.0
                    record_bad_image(self._spec, batch.step, sample_id, str(square))
        return batch._replace(images=images, waiting=None)

    def close(self) -> None:
        """End the loader processes."""
        self._end()
        self._batches.close()

    def _end(self) -> None:
        for inbox in self._inboxes:
            inbox.put(None)


class _Inbox(Iterable[Readers]):
    """Queue of `Readers` to one loader process, or within this process; None ends it."""

    def __init__(self, *, is_shared: bool) -> None:
        self._is_shared = is_shared
        self._queue: Any = queue.SimpleQueue()
        if is_shared:
            with in_shared_memory():
                self._queue = CONTEXT.Queue()
            # at exit, do not wait for a dead process to empty the queue
            self._queue.cancel_join_thread()

    def put(self, readers: Readers | None) -> None:
        """Send without waiting for the receiver.

        Raises:
            AttributeError, pickle.PicklingError: the readers cannot be sent to another process.
        """
        # pickled here, because the queue's own thread would print the error and drop the message
        self._queue.put(pickle.dumps(readers) if self._is_shared else readers)

    def __iter__(self) -> Iterator[Readers]:
        return iter(self._receive, None)

    def _receive(self) -> Readers | None:
        message = self._queue.get()
        return pickle.loads(message) if self._is_shared else message  # noqa: S301 - from here


def stream(
    spec: StreamSpec, group_of: GroupOf, *, start: int, stop: int, device: torch.device = _CPU
) -> Iterator[Batch]:
    """Yield this rank's batches of steps [start, stop) under one placement; see `BatchStream`."""
    batches = BatchStream(spec, start=start, device=device)
    batches.extend(group_of, stop)
    try:
        yield from batches
    finally:
        batches.close()


class Upload:
    """Copies tensors to a device on a stream of its own; on a CPU there is nothing to copy."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def stream(self) -> Any:
        """Return a context in which the device's work is queued beside the training's."""
        return torch.cuda.stream(self._stream)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Start the copies; kernels launched afterwards wait for them, the host does not."""
        if self._stream is None:
            return tensors
        with self.stream():
            there = tuple(tensor.to(self._device, non_blocking=True) for tensor in tensors)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for tensor in there:
            # the memory belongs to the copy stream, which must not reuse it while it is in use here
            tensor.record_stream(current)
        return there
