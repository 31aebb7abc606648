"""Our numbers beside those of other implementations, which only ``make agreement`` installs."""
