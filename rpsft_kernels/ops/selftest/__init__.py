"""Tests the backends where they are installed: on the device at hand, with the kernels that serve it there.

========== =====================================================================================================
cases      what is tested: forms, dtypes, layouts, orientations, classes of ranks
inputs     the numbers: random ones, and ones whose results are exact in any order of summation
exact      results in float64, and how far rounding may take others from them
checks     one case: against float64, bit for bit where that is due, zero at the anchor, NaN, the same bits again
suite      all cases on one subject, which kernels that launched, and what was wrong
report     the table
record     the file that says which kernels have passed on which device
gate       the quick part, run by itself before the first launch on a device without such a record
========== =====================================================================================================

Backends are called directly, not through the registered operators: those ask ``gate`` first.
"""
