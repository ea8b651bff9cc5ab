"""ImageNet1k and every set in its layouts: folders, packed shards, batches of pixels."""
