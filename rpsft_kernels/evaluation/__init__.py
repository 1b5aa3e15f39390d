"""One call: weights paired with anchors, in buckets, projected, summed over ranks, pulled back."""
