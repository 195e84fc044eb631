"""Data sets, streams of tasks, the runner and its report."""
