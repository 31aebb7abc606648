"""The C library's memory allocator, told to keep what it has."""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # M_… of glibc's malloc.h


def tune_cpu_allocator() -> bool:
    """Have glibc keep freed memory for the next tensor instead of giving it back to the system at once.

    By default every large tensor of every step is fresh memory, whose pages the system fills with zeros when they are
    first touched.  The memory that a process holds stays near its peak; results do not change.  For the whole process;
    call it once, before the work.  The command line does.

    Returns:
        Whether the C library took both settings; elsewhere than on glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # macOS, musl, Windows
        return False
    # Either alone switches glibc's own adaptation off: with the second alone memory is given back more often than ever.
    return bool(mallopt(MMAP_THRESHOLD, 2**30)) and bool(mallopt(TRIM_THRESHOLD, 2**31 - 1))
