"""Measure how many training samples per second one core makes from photographs.

Our pipeline is compared with that of the MAE recipe, where Pillow decodes, and torchvision crops,
mirrors, converts and normalises. Both make (3, 224, 224) float32 with the same scale of crops. Each
runs in a process of its own, one at a time. Likeness is the structural similarity of the luma of
the same crops, before they are mirrored and normalised.
"""

import io
import multiprocessing
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torchmetrics.functional.image import structural_similarity_index_measure
from torchvision import transforms
from torchvision.transforms import functional

from benches.harness import Report, interleave
from benches.photographs import photographs
from benches.settings import BenchConfig
from moce_dist.arrays import Float64, Pixels
from moce_dist.data.decoders import jpeg_header, jpeg_pixels
from moce_dist.data.device import DeviceDecoder, Waiting
from moce_dist.data.images import (
    MEAN,
    STD,
    Box,
    draw_cut,
    open_croppable,
    random_box,
    sample_generator,
    to_planes,
)
from moce_dist.data.packing import at_most
from moce_dist.settings import ConfigError

SIZES = {"500": (500, 375), "2000": (2000, 1500)}
_STORE_SIDE, _EIGHTH = 512, 8


def run(config: BenchConfig) -> Report:
    """Measure both pipelines at both sizes, and how alike their crops are."""
    torch.set_num_threads(1)
    contents = {
        name: photographs(config, *size, config.bench.images) for name, size in SIZES.items()
    }
    variants: dict[str, LoaderProcess] = {}
    for name, encoded in contents.items():
        theirs, ours = reference_pipeline(config), our_pipeline(config)
        variants[f"pil_torchvision_{name}"] = LoaderProcess(theirs, encoded)
        variants[f"moce_dist_{name}"] = LoaderProcess(ours, encoded)
        variants[f"entropy_{name}"] = LoaderProcess(entropy_alone, encoded)
    stored = [at_most(content, _STORE_SIDE) or content for content in contents["2000"]]
    variants["stored_2000"] = LoaderProcess(our_pipeline(config), stored)
    bench = config.bench
    seconds = interleave(variants, rounds=bench.rounds, warmup=bench.warmup_rounds)
    for process in variants.values():
        process.close()
    rates = {name: [bench.images / s for s in series] for name, series in seconds.items()}
    report = Report("decode", config).add_variants(rates, unit="images/s")
    for name, encoded in contents.items():
        if not torch.cuda.is_available():
            report.skipped[f"device_{name}"] = "no GPU (data.decode_on)"
            continue
        try:
            rates = {f"device_{name}": device_rates(config, encoded)}
        except ConfigError as error:
            report.skipped[f"device_{name}"] = str(error)
        else:
            report.add_variants(rates, unit="images/s")
    for name, encoded in contents.items():
        report.add_ratio(f"moce_dist_{name}", f"pil_torchvision_{name}")
        report.figures[f"bytes_per_image_{name}"] = int(np.mean([len(c) for c in encoded]))
        # share of a sample's time if a crop needed all rows of the image
        rates_of = (report.variants[f"{who}_{name}"]["median"] for who in ("moce_dist", "entropy"))
        report.figures[f"entropy_share_{name}"] = next(rates_of) / next(rates_of)
    report.figures["bytes_per_image_stored"] = int(np.mean([len(c) for c in stored]))
    report.add_ratio("stored_2000", "moce_dist_2000")
    report.add_ratio("stored_2000", "pil_torchvision_2000")
    likeness = np.concatenate([similarities(config, encoded) for encoded in contents.values()])
    report.figures["ssim_mean"] = float(likeness.mean())
    report.terms["decode_images_s"] = report.variants["moce_dist_500"]["median"]
    report.figures["ssim_p01"] = float(np.percentile(likeness, 1))
    return report


class LoaderProcess:
    """A process that runs a pipeline over all contents each time it is called."""

    def __init__(
        self,
        pipeline: Callable[[bytes], object],
        contents: Sequence[bytes],
    ) -> None:
        def serve() -> None:
            torch.set_num_threads(1)
            while theirs.recv():
                begin = time.process_time()
                for content in contents:
                    pipeline(content)
                theirs.send(time.process_time() - begin)

        context = multiprocessing.get_context("fork")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=serve, daemon=True)
        self._process.start()

    def __call__(self) -> float:
        """Run once over all contents; return seconds of processor time, without waiting."""
        self._ours.send(True)
        seconds: float = self._ours.recv()
        return seconds

    def close(self) -> None:
        """End the process."""
        self._ours.send(False)
        self._process.join()


def reference_pipeline(config: BenchConfig) -> Callable[[bytes], torch.Tensor]:
    """Make the transform of the MAE recipe, as torchvision and Pillow do it."""
    data = config.data
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                data.image_size,
                scale=(data.crop_scale_min, 1.0),
                interpolation=transforms.InterpolationMode.BICUBIC,
            ),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )

    def decode(content: bytes) -> torch.Tensor:
        with Image.open(io.BytesIO(content)) as image:
            sample: torch.Tensor = transform(image.convert("RGB"))
        return sample

    return decode


def device_rates(config: BenchConfig, contents: Sequence[bytes]) -> list[float]:
    """Measure `data.decode_on: device`, random draws included: images per second of one thread."""
    data, rates = config.data, []
    decoder = DeviceDecoder(data.image_size, torch.device("cuda"))
    for _ in range(config.bench.warmup_rounds + config.bench.rounds):
        begin, waiting = time.perf_counter(), Waiting()
        for number, content in enumerate(contents):
            draws = sample_generator(config.seed, 0, str(number))
            image = open_croppable(content)
            cut = draw_cut(image, scale_min=data.crop_scale_min, hflip=True, draws=draws)
            assert waiting.take(number, number, cut)
        crops = waiting.collect()
        assert crops is not None
        assert all(isinstance(square, torch.Tensor) for square in decoder.decode(crops))
        torch.cuda.synchronize()
        rates.append(len(contents) / (time.perf_counter() - begin))
    return rates[config.bench.warmup_rounds :]


def our_pipeline(config: BenchConfig) -> Callable[[bytes], object]:
    """Make a function that decodes as the stream does, each time with new draws."""
    data, count = config.data, 0

    def decode(content: bytes) -> object:
        nonlocal count
        count += 1
        draws = sample_generator(config.seed, 0, str(count))
        image = open_croppable(content)
        cut = draw_cut(image, scale_min=data.crop_scale_min, hflip=True, draws=draws)
        return to_planes(cut.pixels(data.image_size))

    return decode


def entropy_alone(content: bytes) -> object:
    """Decode a JPEG at an eighth of its size, which is little more than entropy decoding."""
    header = jpeg_header(content)
    assert header is not None
    width, height = (-(-side // _EIGHTH) for side in (header.width, header.height))
    return jpeg_pixels(content, width, height, _EIGHTH, is_fast=True)


def similarities(config: BenchConfig, contents: Sequence[bytes]) -> Float64:
    """Compare seeded crops of every image with the reference's; return one similarity each."""
    size, values = config.data.image_size, []
    for number, content in enumerate(contents):
        image = open_croppable(content)
        for repeat in range(config.bench.crops):
            draws = sample_generator(config.seed, repeat, str(number))
            box = random_box(image.width, image.height, config.data.crop_scale_min, draws)
            values.append(similarity(image.crop(box, size), reference_crop(content, box, size)))
    return np.array(values)


def reference_crop(content: bytes, box: Box, size: int) -> Pixels:
    """Decode with Pillow, crop, then resize, as torchvision's resized_crop; (S, S, 3) uint8."""
    with Image.open(io.BytesIO(content)) as image:
        crop = functional.resized_crop(
            image.convert("RGB"),
            box.upper,
            box.left,
            box.lower - box.upper,
            box.right - box.left,
            [size, size],
            functional.InterpolationMode.BICUBIC,
        )
    return np.asarray(crop)


def similarity(ours: Pixels, theirs: Pixels) -> float:
    """Compute the structural similarity of the luma (ITU-R 601) of two images (S, S, 3) uint8."""
    weights = torch.tensor([0.299, 0.587, 0.114])
    lumas = (torch.from_numpy(p.copy()).float() @ weights for p in (ours, theirs))
    a, b = (luma[None, None] for luma in lumas)
    value = structural_similarity_index_measure(a, b, data_range=255.0)
    assert isinstance(value, torch.Tensor), "one value unless more was asked for"
    return float(value)
