"""Grading of handed-in labs: release, collect, grade in a jail, report.

What an answer is worth is decided outside the process that ran it, on plain data; the package's exercises
(`llmcourse.checks`) are the only tests. Nothing is imported here: `llmcourse grade --help` must answer at once.
"""
