"""One call: it pairs weights with anchors, sorts them into buckets, projects, sums over ranks and pulls back."""
