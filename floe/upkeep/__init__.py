"""Looking after a store: what nobody names is removed, what is damaged is found and repaired, a lost index is made anew."""
