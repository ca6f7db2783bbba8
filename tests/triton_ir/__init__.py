"""Triton's kernels on the CPU, as its compiler makes them for a GPU, with bounds and races checked.

``launches.py`` takes the place of a launch: the kernel is compiled to Triton's intermediate representation for compute
capability 9.0, ``parse.py`` reads that, and ``execute.py`` runs it on the tensors, many programs at once. A program
that reads or writes outside of a tensor, two that write to one place, and one that reads what another writes are
errors. ``ptx.py`` runs the assembly that kernels hold.
"""
