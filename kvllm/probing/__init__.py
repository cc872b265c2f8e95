"""Suites, their runner, scorers, and the encoder that measures semantic keys."""
