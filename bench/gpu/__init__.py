"""What `bench/gpu_check.py` runs on a GPU: a table of stages, each a module here that is run in a process of its own.

    lines.py     one JSON line a result, in the file the moment it exists: `emit`
    stages.py    the table of stages, and the runner that gives each its time and keeps what it wrote
    shapes.py    what is measured, in full and in the dry run on a CPU
    launches.py  the Triton kernels that these shapes need, and their compilation without a GPU
    prepare.py   what is compiled on the working machine and carried to the one with the GPU
    summary.py   the table at the end; section.py makes the docs' part of committed lines
    machine.py smoke.py build.py kernels.py host.py rivals.py chosen_tests.py memcheck.py bert.py sweep.py   the stages

smart-pytorch may be missing where the GPU is: nothing here imports it but where it is timed.
"""
