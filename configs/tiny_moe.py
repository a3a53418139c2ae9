"""For tests: the tiny model with four experts, of which a token has two."""

from configs import tiny


def get_config():
    c = tiny.get_config()
    c.model.experts = 4
    return c
