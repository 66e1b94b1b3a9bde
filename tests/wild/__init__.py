"""Models, data and settings as people have them: small cases of what public reports say breaks tools of this kind.

A new report becomes a row of the table of its kind: the case, and what is right.
"""
