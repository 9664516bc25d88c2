"""Commands that use trained models: `routes`, `heldout`, `predict`, `onnx` of `-m moce_dist`.

A MODEL is a task's folder in a run (RUN/transfer/TASK: its fits are chosen by flags), the folder of
one fitted model, or an exported backbone (RUN/transfer/TASK/backbone, for `onnx`).
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moce_dist.cli import command_parser, quiet_libraries
from moce_dist.config import Config, load_config
from moce_dist.data.listing import list_images
from moce_dist.run.directory import Run, find_run, load_run
from moce_dist.run.lease import hold
from moce_dist.run.names import as_text, json_line
from moce_dist.settings import ConfigError
from moce_dist.transfer.request import experts_of, parse_experts
from moce_dist.transfer.tasks import Item

_CONFIG = "config.json"


def routes(argv: Sequence[str]) -> None:
    """List the routes of a run's MoCE, or export the dense ViT of one or of a stage.

    Raises:
        ConfigError: there is no such run, checkpoint or expert.
    """
    parser = command_parser(
        "routes", routes.__doc__, "routes runs/quickstart --experts 3,1,0 --out vit"
    )
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--experts", metavar="LIST", help="route to export, one expert a layer")
    parser.add_argument("--dense", choices=("mae", "control"), help="or the stage to export")
    parser.add_argument("--out", metavar="DIR", help="folder for the exported ViT")
    args = parser.parse_args(argv)
    experts = parse_experts(args.experts)
    if [experts, args.dense].count(None) != (2 if args.out is None else 1):
        raise ConfigError(
            "--experts, --dense and --out: name one of the first two and --out to export a ViT, "
            "none to list the routes"
        )
    run, config = _open_run(args.run)
    if args.dense is None and config.moe.kind != "cluster":
        raise ConfigError(f"{run.root}: has no routes: {experts_of(config)}")
    quiet_libraries()
    from moce_dist.transfer.choosing import need_stage
    from moce_dist.transfer.routes import export_dense, export_route, list_routes, route_lines

    if args.out is None:
        _say(*route_lines(list_routes(run, config, need_stage(run, "moce"))))
        return
    out = Path(args.out)
    with hold(out):
        if experts is None:
            files = export_dense(run, config, args.dense, out)
        else:
            files = export_route(run, config, experts, out)
        _say(*map(str, files))


def _open_run(given: str) -> tuple[Run, Config]:
    return load_run(find_run(given, load_config(None)))


def heldout(argv: Sequence[str]) -> None:
    """Say how well experts reconstruct held-out images of their own clusters, and others do.

    Writes one line of JSON per cluster and one for all: the number of images, and the mean losses
    of the images' own experts, of other experts (their mean, and the worst), of the average of all
    experts, and of the control.

    Raises:
        ConfigError: there is no such run, or it has no experts of clusters or held-out images.
    """
    parser = command_parser("heldout", heldout.__doc__, "heldout runs/quickstart")
    parser.add_argument("run", metavar="RUN", help="run directory")
    run, config = _open_run(parser.parse_args(argv).run)
    quiet_libraries()
    from moce_dist.transfer.heldout import held_out_losses

    for row in held_out_losses(run, config):
        _say(json_line(row))


def predict(argv: Sequence[str]) -> None:
    """Look at images with a fitted model; one line of JSON an image, drawings into --out.

    Raises:
        ConfigError: there is no such model or image.
        RuntimeError: some images could not be read; the others are done.
    """
    parser = command_parser(
        "predict", predict.__doc__, "predict runs/quickstart/transfer/digits photo.png"
    )
    _add_model(parser)
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="files or folders")
    parser.add_argument("--top", metavar="N", type=int, default=5, help="classes of a line")
    parser.add_argument("--batch-size", metavar="B", type=int, default=32, help="images at once")
    parser.add_argument(
        "--out", metavar="DIR", help="folder for segmentation's masks or images with boxes drawn"
    )
    parser.add_argument(
        "--min-score",
        metavar="P",
        type=float,
        help="least score of an object of detection, 0 to 1 (default 0.5)",
    )
    args = parser.parse_args(argv)
    if args.min_score is not None and not 0 <= args.min_score <= 1:
        raise ConfigError(f"--min-score {args.min_score}: must be between 0 and 1")
    if args.top < 1 or args.batch_size < 1:
        raise ConfigError(f"--top {args.top}, --batch-size {args.batch_size}: must be 1 or more")
    folder, out = find_model(args), Path(args.out) if args.out else None
    images, bad = list_named(args.images), 0
    with hold(*([out] if out else [])):
        quiet_libraries()
        from moce_dist.transfer import predict as models

        options = {"top": args.top, "out": out, "min_score": args.min_score}
        for line in models.predict(folder, images, batch_size=args.batch_size, **options):
            _say(json_line(line))
            bad += "error" in line
    if bad:
        raise RuntimeError(f"{bad} of {len(images)} images could not be read")


def onnx(argv: Sequence[str]) -> None:
    """Write a fitted model or an exported backbone as ONNX, and beside it what its pixels are.

    Raises:
        ConfigError: there is no such model, it is a detector, or the package `onnx` is missing.
    """
    parser = command_parser(
        "onnx", onnx.__doc__, "onnx runs/quickstart/transfer/digits --out digits.onnx"
    )
    _add_model(parser)
    parser.add_argument("--out", metavar="FILE", required=True, help="the .onnx file to write")
    args = parser.parse_args(argv)
    out = Path(args.out)
    if out.suffix != ".onnx":
        raise ConfigError(f"--out {out}: must end in .onnx")
    if find_spec("onnx") is None:
        raise ConfigError("onnx: the package is missing (pip install 'moce-dist[onnx]')")
    folder = find_model(args)
    quiet_libraries()
    from moce_dist.transfer.predict import export_onnx

    _say(*map(str, export_onnx(folder, out)))


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "routes": routes,
    "heldout": heldout,
    "predict": predict,
    "onnx": onnx,
}


def _say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="RUN/transfer/TASK, or a model's folder")
    parser.add_argument("--backbone", metavar="NAME", help="whose fit (default moce)")
    parser.add_argument("--protocol", metavar="NAME", help="which fit (default finetune)")
    parser.add_argument("--seed", metavar="N", type=int, help="which fit (default the lowest)")
    parser.add_argument(
        "--best", action="store_true", help="the model of the best early view, not the last one"
    )


def find_model(args: Any) -> Path:
    """Return the folder of the model that the flags select.

    Raises:
        ConfigError: there is none; the message lists those that exist.
    """
    folder, which = Path(args.model), "best" if args.best else "last"
    if (folder / _CONFIG).is_file():
        return folder
    fits = {
        path.parent.parent.name: path.parent
        for path in (folder / "models").glob(f"*/{which}/{_CONFIG}")
        if re.fullmatch(r".+-[^-]+-\d+", path.parent.parent.name)
    }
    if not fits:
        raise ConfigError(
            f"{folder}: holds no {which} model; jobs/transfer.py makes them with "
            "transfer.save_models, by the protocols finetune and linear; fits made without it need "
            "--fresh"
        )
    wanted = {"backbone": args.backbone, "protocol": args.protocol, "seed": args.seed}
    given = {
        key: str(value).replace("/", "_") for key, value in wanted.items() if value is not None
    }
    named = {name: dict(zip(wanted, name.rsplit("-", 2), strict=True)) for name in fits}
    found = [name for name, parts in named.items() if given.items() <= parts.items()]
    if not found:
        raise ConfigError(f"{folder}: has no model of {given}, only {', '.join(sorted(fits))}")

    def preference(name: str) -> tuple[bool, bool, int, str]:
        backbone, protocol, seed = named[name].values()
        return backbone not in ("moce", "token"), protocol != "finetune", int(seed), backbone

    return fits[min(found, key=preference)]


def list_named(paths: Sequence[str]) -> list[Item]:
    """List the given files, and the images of the given folders.

    The key of an image in a folder is its path relative to that folder.

    Raises:
        ConfigError: a path is missing, or a folder holds no images.
    """
    found = []
    for path in map(Path, paths):
        if path.is_file():
            found.append(Item(as_text(path.name), path))
            continue
        if not path.is_dir():
            raise ConfigError(f"{path}: is neither a file nor a folder")
        if not (inside := list_images(path).usable()):
            raise ConfigError(f"{path}: holds no images")
        found += [Item(as_text(p.relative_to(path)), p) for p in inside]
    return found
