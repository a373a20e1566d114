"""Teacher refit: a plan's maps fitted anew, one site after another, on the compressed stream.

``traced`` records the model's graph with a switch at each site; ``route`` runs such a graph piece
by piece, once dense and once as the plan has it; ``store`` keeps what lies between two pieces on
disk; ``target`` says what a site should give for the stream to come back to the dense model's;
``regression`` fits it; ``refit_plan`` is ``nbl.refit``.
"""
