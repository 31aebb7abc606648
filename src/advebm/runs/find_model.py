"""Find the network of a run, a folder, a Hub repository or a user-defined module."""

from pathlib import Path

from torch import nn

from advebm.models import network
from advebm.models.factory import Own
from advebm.models.network import Network, Normalize
from advebm.runs.run import Run


def find_model(where: str | Path, *, checkpoint: str = "latest") -> Network:
    """Load the network of a run, a checkpoint, a published model (folder or ``hf:USER/NAME``) or a user-defined module.

    A user-defined module is given as ``PACKAGE.MODULE:FACTORY``, see :class:`Own`; it receives images in [0, 1] and
    normalises them itself.  The returned network is in eval mode.

    Raises:
        UserError: nothing is found, a file is damaged, or the factory fails.
    """
    if (Path(where) / "config.yaml").is_file():
        return Run.open(where).model(checkpoint)[0]
    if is_factory(where):
        return Network(Normalize((0.0,), (1.0,)), Own(str(where)).make(), nn.Identity()).eval()
    return network.load_model(where)


def is_factory(where: str | Path) -> bool:
    """Return whether a model is given as ``PACKAGE.MODULE:FACTORY``, which imports code, rather than as files."""
    return ":" in str(where) and not str(where).startswith("hf:") and not Path(where).exists()
