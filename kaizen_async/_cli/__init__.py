"""The command `kaizen-async`: look executions up, wait for them and watch them from a terminal or a script.

Needs the extra `cli` (click and rich), so nothing else in the package imports it. A command is one file each; what they
share is named after what it does: where ids come from (`ids`), where results go (`results`, `rows`, `json_lines`), how
far the work is (`progress`), and how Ctrl-C ends it (`stopping`).

Exit statuses:
    0: Every id was found; for `wait` and `watch`, every execution has ended.
    1: Some ids failed, or time ran out.
    2: Misuse: bad options, no ids, a bad URL, a key that is malformed or refused.
    130: Ctrl-C. A second Ctrl-C does not wait for anything. 129 and 143 are the same for SIGHUP and SIGTERM.
    141: Whoever read standard output has stopped reading, as `head` does.
"""
