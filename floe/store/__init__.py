"""What every path shares: ids, errors, formats, object stores, the index, the node cache and the fetcher."""
