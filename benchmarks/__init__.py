"""``make bench``: our inner loops beside the peers', each in a process of its own, in turns."""
