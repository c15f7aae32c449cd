"""Published data sets, images and captions apart, into the shards that training reads."""
