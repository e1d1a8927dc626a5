"""How glibc treats memory that a process has freed: kept for speed, or given back so that a bound can be promised."""

import ctypes

OWN_MAPPING = 1 << 20  # bytes; larger blocks are mapped one by one
TRIM = 16 << 20  # bytes of free heap that glibc keeps


def keep_freed_memory() -> None:
    """Tell glibc not to hand freed memory back to the system after every step, only to ask for it again in the next.

    To be called before the first large allocation. Each step's activations would otherwise be new pages, which the
    system zeroes: a tenth to a quarter of a step on a CPU. Other C libraries have no such setting; nothing is done.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(ctypes.c_int(-4), ctypes.c_int(0))  # M_MMAP_MAX: no block is mapped by itself
    mallopt(ctypes.c_int(-1), ctypes.c_int(2**31 - 1))  # M_TRIM_THRESHOLD: nothing is given back


def give_back_freed_memory() -> None:
    """Tell glibc to hand large freed blocks back at once: the opposite of `keep_freed_memory`, and undoes it.

    Without this the heap has holes that no later block fits into, and grows to more than twice what is in use, the more
    the more often shapes change: no bound could be promised. The price is that every block is new pages, which the
    system zeroes: a step takes up to half as long again. Other C libraries have no such setting; nothing is done.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(ctypes.c_int(-4), ctypes.c_int(1 << 16))  # M_MMAP_MAX: as many blocks as are needed
    mallopt(ctypes.c_int(-3), ctypes.c_int(OWN_MAPPING))  # M_MMAP_THRESHOLD, which would else grow to 32 MiB by itself
    mallopt(ctypes.c_int(-1), ctypes.c_int(TRIM))  # M_TRIM_THRESHOLD
