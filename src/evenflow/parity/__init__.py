"""Whether two engines, machines, types or versions compute the same: a certificate recorded here and checked there.

Owns the certificate's form, the comparison and its bounds. Computes no logits itself: it asks the engine or a server.
"""
