"""Filters that tests name by import path."""


def short(completion, row):
    return True if len(completion) <= 12 else "too long for us"


def odd_rows(completion, row):
    return row["answer"] % 2 == 1


def broken(completion, row):
    return row["no such column"]


def confused(completion, row):
    return 7


NOT_A_FUNCTION = 3


def half(completion, row):
    return 0.5
