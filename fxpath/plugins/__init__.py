"""Where other libraries call fxpath: in the loops of trainers, and in another library's pruner.

Each module imports its library, and nothing here is imported with ``fxpath``:

- :mod:`fxpath.plugins.monitor`: a line of numbers every n steps, for a loop of plain PyTorch;
- :mod:`fxpath.plugins.lightning` and :mod:`fxpath.plugins.transformers`: the same as callbacks of
  Lightning's and of Hugging Face's trainers;
- :mod:`fxpath.plugins.torch_pruning`: path mass as the importance of Torch-Pruning's channels.
"""
