"""Why a model generates, or does not: measurements on a model and its machine.  Their pictures are in reporting."""
