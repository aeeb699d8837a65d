"""Waiting for executions to end: when to poll which one, and what a poll means for those who wait."""
