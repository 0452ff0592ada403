"""A sum of many sites' vectors of which the server sees nothing but the sum.

Every two sites of a round agree on a secret stream of numbers, a *pad*: one of them adds it, the other takes
it off. In the sum of all sites' vectors the pads cancel; a single vector looks like random numbers.

``ring`` writes numbers in fixed point, ``hello`` has the keys of a round and checks those of the others,
``pads`` adds what cancels. Nothing here knows FLARE, models or certificates: signing and checking are handed
in.
"""
