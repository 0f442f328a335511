"""How good a model is, and how sure that is: losses against the entropy floor, exact match, intervals."""
