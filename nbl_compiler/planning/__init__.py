"""Choosing sites and their settings for a budget: what each costs, what each saves, the front."""
