"""How the updates grew: their norms at every checkpoint that a run kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorakit.analysis.spectra import spectrum
from lorakit.analysis.updates import Base, read_source
from lorakit.errors import RequestError
from lorakit.progress import track
from lorakit.train.checkpoints import Checkpoint, CheckpointStore
from lorakit.train.resume import CHECKPOINTS


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteAtStep:
    """One update after one optimizer step.

    Attributes:
        step: the optimizer step.
        site: the site's name.
        norm: ||dW||_F.
        effective_rank: of dW.
    """

    step: int
    site: str
    norm: float
    effective_rank: float


def run_of(path: str | Path) -> Path | None:
    """The run directory that a path is, or whose final adapter it is; None where there is none."""
    path = Path(path)
    for candidate in (path, path.parent) if path.name == "adapter" else (path,):
        if (candidate / CHECKPOINTS).is_dir():
            return candidate
    return None


def adapter_of(path: str | Path) -> Path:
    """The adapter of a run directory, or the path itself."""
    path = Path(path)
    return path / "adapter" if run_of(path) == path else path


def norms_over_training(
    run: Path, *, base: Base | None = None, sites: Sequence[str] = ()
) -> list[SiteAtStep]:
    """The size of every update at every whole checkpoint of a run, in order of the steps.

    Args:
        run: the run directory; `train.keep_checkpoints` says how many it kept.
        base: the weights that are changed; DoRA needs them.
        sites: see `read_source`.

    Raises:
        RequestError: the run kept no checkpoint.
        AdapterFileError: the adapter of a checkpoint cannot be read.
    """
    store = CheckpointStore(run / CHECKPOINTS, keep=1)
    found = [store.read(step) for step in store.steps()]
    whole = [checkpoint for checkpoint in found if isinstance(checkpoint, Checkpoint)]
    if not whole:
        raise RequestError(
            "the run has no whole checkpoint",
            where=str(run / CHECKPOINTS),
            remedy="train with a larger train.keep_checkpoints, or leave the norms out",
        )
    rows: list[SiteAtStep] = []
    for checkpoint in track(whole, "reading checkpoints"):
        # The final adapter was checked against the base; its checkpoints name the same one.
        source = read_source(checkpoint.adapter, base=base, sites=sites, any_base=True)
        for site, update in source.updates.items():
            size = spectrum(update)
            rows.append(
                SiteAtStep(
                    step=checkpoint.step,
                    site=site,
                    norm=size.norm,
                    effective_rank=size.effective_rank,
                )
            )
    return rows
