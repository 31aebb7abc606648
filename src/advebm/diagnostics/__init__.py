"""Measurements that show why a model generates well or badly, and checks of the machine.  reporting plots them."""
