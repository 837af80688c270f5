"""A capture of text from a scripted server: what it is asked, and what is right."""

from kd_plugin.text import ServerWriter


def number_of(body):
    return int(body["messages"][-1]["content"].split()[2].split("+")[0])


def right(body):
    return f"<think>{number_of(body)} twice</think>\n\nIt is {2 * number_of(body)}"


def writer(url, **options):
    return ServerWriter(url, **{"license": "mit", **options})
