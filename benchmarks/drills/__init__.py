"""Fault drills: the jobs are disturbed on a real Ray cluster, and their tables compared with those of undisturbed runs.

``python -m benchmarks.drills --work FOLDER [--only NAME ...]``; what came of it: docs/drills.md.

- ``cluster``: Ray nodes of one CPU, each a process group of its own.
- ``stages``: the three jobs, what they have committed, and their tables beside the undisturbed ones.
- ``scene``: one drill's job: started, struck, watched, and given again where it ended.
- ``faults``: a function for each fault.
- ``report``: rows, and the page.
"""
