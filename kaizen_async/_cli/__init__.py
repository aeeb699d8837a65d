"""The command `kaizen-async`: look executions up, wait for them and watch them from a terminal or a script.

Needs the extra `cli` (click and rich), so nothing else in the package imports it. Each command is one file. They share
the way of an id: `ids` reads it (`formats`), `output` writes its result (`table`, `board`), `results` and `checkpoints`
let another run continue, `progress` says how far the work is, and `ending` how it ends, with the exit statuses.
"""
