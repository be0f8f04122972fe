"""From files to validated preference pairs: schema, safe image decoding, pair datasets, sampling and loading."""
