"""The network that a name means: a run, a folder, the Hub, or a module of one's own."""

from pathlib import Path

from torch import nn

from advebm.models import network
from advebm.models.factory import Own
from advebm.models.network import Network, Normalize
from advebm.runs.run import Run


def find_model(where: str | Path, *, checkpoint: str = "latest") -> Network:
    """The network of a run folder, a checkpoint, a published model's folder, ``hf:USER/NAME`` or a module of one's own.

    A module of one's own is ``PACKAGE.MODULE:FACTORY``, see :class:`Own`; it takes images in [0, 1] as they are, so it
    normalises them itself.  Every network is in eval mode.

    Raises:
        UserError: nothing there, a damaged file, a factory that fails.
    """
    if (Path(where) / "config.yaml").is_file():
        return Run.open(where).model(checkpoint)[0]
    if is_factory(where):
        return Network(Normalize((0.0,), (1.0,)), Own(str(where)).make(), nn.Identity()).eval()
    return network.load_model(where)


def is_factory(where: str | Path) -> bool:
    """Whether a model is named as ``PACKAGE.MODULE:FACTORY``, which imports code, rather than as files."""
    return ":" in str(where) and not str(where).startswith("hf:") and not Path(where).exists()
