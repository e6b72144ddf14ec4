"""Two sets of weights of one architecture: path-metrics, certified bounds, quantization.

``matching`` builds a :class:`~fxpath.pairs.pair.Pair`; ``difference``, ``domination``,
``normalized`` and ``inductive`` interpret its lifted graph, two of them neuron by neuron
(``unrolled``, ``edges``); ``metric``, ``bounds`` and ``quantization`` are what users call.
``common`` is for many sets of weights of one model, which is captured once.
"""
