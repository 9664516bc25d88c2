"""Decoding on the accelerator (`data.decode_on: device`).

Loader processes read samples and draw crops as usual, but leave plain JPEGs encoded. The training
process passes those of a batch to nvImageCodec, which decodes only the crops (a GPU uses its JPEG
engines). They are resized on the device. Loader processes decode all other images (PNG, turned or
damaged images), and the training process decodes on its CPU what nvImageCodec refuses.

    loader process    bytes a, b, c     -> a, c plain: bytes and boxes    b: (3, S, S)
    training process                    -> a, c: (3, S, S) on the device

Without a GPU, nvImageCodec decodes on the CPU through the same calls, slower than a loader process.

Letters: c crops, S side of the square sample in pixels.
"""

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from moce_dist.data.decoders import Encoded, ImageError, door
from moce_dist.data.images import Box, Cut, Jpeg, open_croppable
from moce_dist.settings import ConfigError


class Undecoded(NamedTuple):
    """Crops that are still encoded, as tensors, which processes exchange in shared memory."""

    content: Tensor
    """Bytes of all images, one after the other, uint8."""
    places: Tensor
    """(c, 4) int64: slot in the batch, sample id, first byte, end."""
    boxes: Tensor
    """(c, 4) int64: left, upper, right, lower in pixels."""
    is_mirrored: Tensor
    """(c,) bool."""


@dataclass
class Waiting:
    """Collects the crops of a batch that the device decodes."""

    _images: list[Encoded] = field(default_factory=list)
    _places: list[tuple[int, ...]] = field(default_factory=list)
    _cuts: list[Cut] = field(default_factory=list)
    _bytes: int = 0

    def take(self, slot: int, sample_id: int, cut: Cut) -> bool:
        """Take a crop if the device can decode it; if False, the caller must decode it."""
        if not isinstance(cut.image, Jpeg) or not cut.image.is_plain:
            return False
        content = cut.image.content
        first, self._bytes = self._bytes, self._bytes + len(content)
        self._images.append(content)
        self._places.append((slot, sample_id, first, self._bytes))
        self._cuts.append(cut)
        return True

    def collect(self) -> Undecoded | None:
        """Return the collected crops, None if there are none."""
        if not self._cuts:
            return None
        return Undecoded(
            torch.frombuffer(bytearray().join(self._images), dtype=torch.uint8),
            torch.tensor(self._places),
            torch.tensor([cut.box for cut in self._cuts]),
            torch.tensor([cut.is_mirrored for cut in self._cuts]),
        )


class DeviceDecoder:
    """nvImageCodec for crops of JPEG images.

    Raises:
        ConfigError: the package is not installed.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        try:
            from nvidia import nvimgcodec
        except ImportError:
            raise ConfigError(
                "data.decode_on = 'device': package nvidia-nvimgcodec-cu13 is not installed; "
                "pip install -e '.[device]'"
            ) from None
        self.device, self._size, self._codec = device, size, nvimgcodec
        on_cpu = device.type == "cpu"
        number = device.index if device.index is not None else nvimgcodec.NVIMGCODEC_DEVICE_CURRENT
        self._decoder = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY if on_cpu else number,
            max_num_cpu_threads=1,
            backends=[nvimgcodec.Backend(nvimgcodec.CPU_ONLY)] if on_cpu else None,
        )
        self._params = nvimgcodec.DecodeParams(apply_exif_orientation=False)

    def decode(self, crops: Undecoded) -> list[Tensor | ImageError]:
        """Decode and resize; return (3, S, S) uint8 on the device, or the error, for each crop."""
        content, places = crops.content.numpy(), crops.places.tolist()
        boxes = [Box(*box) for box in crops.boxes.tolist()]
        encoded = [content[first:end] for *_, first, end in places]
        parts = [self._part(image, box) for image, box in zip(encoded, boxes, strict=True)]
        stream = torch.cuda.current_stream(self.device).cuda_stream if self._is_cuda else 0
        known, decoded = [row for row, part in enumerate(parts) if part], [None] * len(parts)
        # after an error of the whole call, all crops are decoded on the CPU below
        with suppress(ImageError), door():
            found = self._decoder.decode(
                [parts[row] for row in known], params=self._params, cuda_stream=stream
            )
            for row, pixels in zip(known, found, strict=True):
                decoded[row] = pixels
        squares: list[Tensor | ImageError] = []
        for pixels, image, box in zip(decoded, encoded, boxes, strict=True):
            square = None
            if pixels is not None:
                crop = from_dlpack(pixels) if self._is_cuda else torch.from_numpy(np.array(pixels))
                square = self._resize(crop)
            squares.append(self._decode_here(image.tobytes(), box) if square is None else square)
        for row in torch.nonzero(crops.is_mirrored).flatten().tolist():
            if isinstance(square := squares[row], Tensor):
                squares[row] = square.flip(-1)
        return squares

    def _part(self, image: NDArray[np.uint8], box: Box) -> Any:
        with suppress(ImageError), door():
            return self._codec.CodeStream(image).get_sub_code_stream(
                region=self._codec.Region(box.upper, box.left, box.lower, box.right)
            )
        return None

    @property
    def _is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def _resize(self, crop: Tensor) -> Tensor | None:
        planes = crop.permute(2, 0, 1)[None].to(torch.float32)
        try:
            square = torch.nn.functional.interpolate(
                planes, (self._size, self._size), mode="bicubic", antialias=True
            )
        except RuntimeError:
            # a kernel's shared memory or the device's memory is too small for so large a crop
            return None
        return square[0].round_().clamp_(0, 255).to(torch.uint8)

    def _decode_here(self, image: bytes, box: Box) -> Tensor | ImageError:
        try:
            square = open_croppable(image).crop(box, self._size)
        except ImageError as error:
            return error
        return torch.from_numpy(np.ascontiguousarray(square)).permute(2, 0, 1).to(self.device)
