"""Drafters: who proposes the tokens that the target verifies."""
