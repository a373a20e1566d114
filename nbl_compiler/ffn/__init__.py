"""Calibration of FFN sites: what is kept of their activations, and how they are fitted.

``sites`` names one observed FFN; ``stages`` are what one pass over the text adds up at one site;
``keep_and_fold``, ``predicted`` and ``exact`` turn stages into fits, one form of the folded FFN
each; ``fit`` chooses between them.
"""
