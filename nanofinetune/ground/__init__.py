"""What all rooms stand on: errors for people, command lines, devices, the process, precisions.

Read `errors` and `cli` first; `device`, `xla`, `process` and `precision` when a name from there comes up.
"""
