"""What machine code says: read through the tools that come with Triton, and analysed."""
