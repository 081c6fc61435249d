"""Token batches for both sides. All batches have one shape, so each pass compiles once."""

import numpy as np

VOCAB = 50
SHAPE = ROWS, WIDTH = 3, 14
RESPONSE = 32  # length of a greedy continuation


def left_padded():
    """Returns a full row and two left-padded rows: tokens, positions, segments."""
    tokens = np.random.default_rng(7).integers(1, VOCAB, SHAPE)
    segments = np.ones(SHAPE, int)
    segments[1, :4] = segments[2, :9] = 0
    tokens, positions = np.where(segments, tokens, 0), np.cumsum(segments, axis=1) - 1
    return tokens, np.maximum(positions, 0), segments


def packed():
    """Returns rows of several sequences: tokens, positions, segments."""
    tokens = np.random.default_rng(8).integers(1, VOCAB, SHAPE)
    positions, segments = np.zeros(SHAPE, int), np.zeros(SHAPE, int)
    for row, lengths in enumerate([(5, 9), (8, 2, 3), (14,)]):
        start = 0
        for number, length in enumerate(lengths, 1):
            segments[row, start : start + length] = number
            positions[row, start : start + length] = np.arange(length)
            start += length
    return np.where(segments, tokens, 0), positions, segments


def spans(segments):
    """Row and columns of every sequence in a batch."""
    for row, numbers in enumerate(segments):
        for number in range(1, numbers.max() + 1):
            columns = np.flatnonzero(numbers == number)
            yield row, slice(columns[0], columns[-1] + 1)


def successors(segments):
    """True where the next column continues the sequence: log-probabilities are compared there."""
    following = np.pad(segments[:, 1:], ((0, 0), (0, 1)))
    return (segments != 0) & (segments == following)


def loss_weights(segments):
    """Returns the weights w of the loss Σ w · log π(next token) whose gradients are compared."""
    drawn = np.random.default_rng(9).normal(size=segments.shape)
    return (drawn * successors(segments)).astype(np.float32)
