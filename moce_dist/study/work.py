"""One piece of a study: shared stages are linked, then a stage is made or a task is fitted.

Finished work is found complete and interrupted work is resumed, so a piece may be carried out any
number of times.
"""

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

from moce_dist.cli import quiet_libraries
from moce_dist.config import Config
from moce_dist.run import lease
from moce_dist.run.artefacts import COMPLETE
from moce_dist.run.directory import Run, StoppedError, open_run
from moce_dist.run.files import link_tree
from moce_dist.run.names import typed
from moce_dist.study.plan import SHARED, Piece

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PieceOutcome:
    """The result of a piece: how long it took and, if it failed, the reason."""

    id: str
    seconds: float
    failure: str = ""


def prepare(piece: Piece, config: Config) -> None:
    """Make a piece's run with the run's `config`, and link the stages that other runs have made.

    The configuration of a task has changes of its own, which are not the run's. One process calls
    this for all pieces, so that pieces of a run can start in parallel.
    """
    run = open_run(piece.root, config)
    for stage, root in piece.links:
        for name in SHARED[stage]:
            link_artefact(root / name, run.root / name)


def carry_out(piece: Piece) -> PieceOutcome:
    """Carry out a prepared piece in this process; a failure is returned as an outcome.

    Raises:
        StoppedError: SIGTERM came, and the state is saved.
    """
    quiet_libraries()
    start, reason = time.monotonic(), ""
    try:
        _make(Run(piece.root), piece)
    except StoppedError:
        raise
    except Exception as error:
        log.debug("%s", piece.id, exc_info=True)
        reason = typed(error)
    return PieceOutcome(piece.id, time.monotonic() - start, reason)


def _make(run: Run, piece: Piece) -> None:
    if piece.request is not None:
        from moce_dist.launch.training import train
        from moce_dist.transfer import suite

        order = suite.Order(piece.request, piece.config)
        if os.environ.get("RAY_ADDRESS"):
            from moce_dist.launch.away import call_away, lacks_gpu

            if lacks_gpu(piece.config.parallel):
                suite.carry_out_away(run, order, train, call_away)
                return
        suite.carry_out(run, order, train)
        return
    from moce_dist.pipeline import Pipeline

    # a kind of piece is the method of its name
    getattr(Pipeline(run, piece.config), piece.kind)()


def carry_out_alone(leases: list[tuple[Path, str]], piece: Piece) -> PieceOutcome:
    """Carry out a piece on one worker of a Ray cluster, without using the rest of the cluster."""
    if not lease.held():
        lease.watch(leases)
    os.environ.pop("RAY_ADDRESS", None)
    return carry_out(piece)


def carry_out_quietly(piece: Piece) -> PieceOutcome:
    """Carry out a piece in parallel with others; log only warnings and errors."""
    quiet_libraries()
    logging.getLogger("moce_dist").setLevel(logging.WARNING)
    return carry_out(piece)


def link_artefact(source: Path, folder: Path) -> None:
    """Put a complete artefact of another run into a run, by `link_tree`, unless it is there."""
    marker = (source / COMPLETE).read_text()
    if not (folder / COMPLETE).is_file() or (folder / COMPLETE).read_text() != marker:
        link_tree(source, folder)
