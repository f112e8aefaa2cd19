"""`python -m benchmarks gpu`: a queue of steps for a few minutes on one GPU, best first.

Each step has a process of its own and a limit of time. What it finds is on disk the moment it is
known, so a step that hangs, faults or runs out of memory costs itself alone.

    place     where it runs: the GPU at a model's true shapes, or a rehearsal on a CPU
    results   the file of results; which of them a step need not find again
    worker    a step's process
    watch     the processes of the steps: limits, the device's health, what goes on after a fault
    schedule  which step is begun when, within the minutes
    checks    correctness against float64 (`lens_checks`, `attention_checks`, `facts`)
    headlines, csrc, sweep   times; the CUDA kernels; tiles
    steps     all of them, in order
    table     what is printed last
"""
