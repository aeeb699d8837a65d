"""One lookup, from an id to its outcome: when to send, how often, and what a failure means."""
