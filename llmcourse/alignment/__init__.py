"""Alignment: log-probabilities of responses, the losses made of them, and the stages that train on preferences and
rewards."""
