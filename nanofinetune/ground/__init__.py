"""What all other subpackages use: errors for people, command lines, devices, precisions, and which process this is.

Read `errors` and `cli` first; `environment` (which rank is this?), `names` (what can be a file?), `device`, `xla`,
`process`, `machine`, `progress` (how far is it?) and `precision` when a name from there comes up.
"""
