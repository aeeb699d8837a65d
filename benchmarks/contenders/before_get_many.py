"""An earlier version of kaizen_async, from the folder in the environment variable KAIZEN_BEFORE."""

from contenders import ours_get_many


class Contender(ours_get_many.Contender):
    """`get_many` of the earlier version, as it was."""

    title = "kaizen_async get_many, before"
