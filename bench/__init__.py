"""How fast smart-fast is, against whom: ``python -m bench``, or ``pytest bench --benchmark-only``."""

import os

# Both are read when torch is loaded. Threads that wait by spinning stretch a 0.1 ms call to 40 ms on a shared machine:
# every contestant of a run waits passively, unless the user says otherwise.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts memory, prints lines otherwise
