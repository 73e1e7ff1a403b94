"""Ways out: what a run trained, in the formats other programs read, with a card.

``trained`` finds what a run trained, ``adapter`` is a LoRA as numbers, ``arithmetic`` adds them,
``kohya`` renames them, ``merge`` folds them into the weights, ``card`` describes them and ``push``
uploads them. ``program`` puts these together for the verb ``export``.
"""
