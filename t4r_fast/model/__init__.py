"""What a session model is: sessions without padding, a mask, a body, and what stands behind it.

sessions.py   a batch as a value: columns of items one after the other, and where sessions begin
mask.py       which items are hidden and which are predicted, as values
inputs.py     columns to vectors
bodies/       XLNet, GRU, self-attention over packed sessions; hf.py pads for all others
known.py      which modules a pass may take apart: their classes, and nothing overridden
next_item.py  scores of all items: loss, rank, top-k, recommendations
model.py      the pass: a function of weights and a batch
store.py      the one saved format; architecture.py: how a model is built, as JSON

Values travel as arguments and results; nothing here writes on a module.
"""
