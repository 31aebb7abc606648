"""Settings that make the C library's memory allocator keep freed memory."""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # M_… of glibc's malloc.h


def tune_cpu_allocator() -> bool:
    """Make glibc keep freed memory for later tensors instead of returning it to the system at once.

    By default every large tensor of every step is fresh memory, whose pages the system fills with zeros at first touch.
    With these settings the process keeps close to its peak memory; results do not change.  They apply to the whole
    process: call this once, before any work, as the command line does.

    Returns:
        Whether the C library accepted both settings; with other libraries than glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # macOS, musl, Windows
        return False
    # Setting either one disables glibc's adaptive thresholds; the second alone would return memory more often.
    return bool(mallopt(MMAP_THRESHOLD, 2**30)) and bool(mallopt(TRIM_THRESHOLD, 2**31 - 1))
