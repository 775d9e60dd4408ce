"""How threads that wait behave, which has to be said before torch is loaded."""

import os


def let_waiting_threads_sleep() -> None:
    """Tell torch's threads, through the environment, to sleep where they wait; a setting stays.

    Spinning ones take the cores from the data workers: 65 against 245 images a second on two busy
    cores.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # But not at once: bfloat16 on CPU waits so often that it runs 50 times slower (ADR 5).
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
